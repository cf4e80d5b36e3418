"""What the device can do by itself: the measure of a step, and of the hour it was taken in."""

import re

import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dist_train.bench.clock import clock_for
from dist_train.build import autocast
from dist_train.data.batch import Batch
from dist_train.tasks import classification as task

SIDE = {"cpu": 768, "cuda": 8192}
REPEATS = {"cpu": 3, "cuda": 10}
REFERENCE_BATCH = {"cpu": 32, "cuda": 2048}
# Dense products without sparsity, in TFLOP/s, from the makers' data sheets: (bf16 or fp16, TF32,
# fp32); without units for TF32 its number is fp32's. By whole words of what
# torch.cuda.get_device_name() gives; the first that fits.
PEAKS = {
    "B200": (2250.0, 1125.0, 75.0),
    "H200": (989.0, 495.0, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 495.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "RTX 4090": (165.0, 83.0, 82.6),
    "RTX 3090": (71.0, 36.0, 35.6),
    "V100": (125.0, 15.7, 15.7),
    "T4": (65.0, 8.1, 8.1),
}
# Words of the names of slower ones of the same number, and of slices.
NOT_THE_SAME = re.compile(r"\b(D|Laptop|MIG|Max-Q|NVL|SUPER|Ti)\b")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def product_rate(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of a large product of matrices right now, with this rank's threads."""
    side, dtype = SIDE[device.type], DTYPES[precision]
    left = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(left)
    clock = clock_for(device)
    torch.mm(left, left, out=out)
    clock.mark()
    for _ in range(REPEATS[device.type]):
        torch.mm(left, left, out=out)
        clock.mark()
    return 2 * side**3 / min(clock.take())


def data_sheet_peak(device: torch.device, precision: str) -> tuple[float, str] | None:
    """Return the FLOP/s of the data sheet, and of what; None for a CPU or an unknown device."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> tuple[float, str] | None:
    """Return the FLOP/s of the GPU called `name`, and of what; None if it is not known.

    Convolutions in fp32 use TF32 where cuDNN may, which is torch's default.
    """
    found = (rates for part, rates in PEAKS.items() if re.search(rf"\b{part}\b", name))
    rates = next(found, None)
    if rates is None or NOT_THE_SAME.search(name):
        return None
    half, tensor_float, single = rates
    if precision != "fp32":
        return 1e12 * half, precision
    convolutions = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue] # torch makes it at run time
    if tensor_float > single and convolutions.fp32_precision == "tf32":
        return 1e12 * tensor_float, "TF32, in which cuDNN convolves fp32"
    return 1e12 * single, "fp32"


def flops_of_a_sample(module: nn.Module, batch: Batch, precision: str) -> float:
    """Return the FLOPs of one sample's forward and backward, counted by torch."""
    part = batch.part(0, min(len(batch), 8))
    params = [p for p in module.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as counter:
        with autocast(precision, part.images.device):
            logits = module(part.images)
        torch.autograd.grad(task.loss_sum(logits, part), params, allow_unused=True)
    return counter.get_total_flops() / len(part)


class Reference:
    """A small net's forward and backward, the same everywhere: the machine of two hours by it.

    A net follows the machine's moods as the steps of a net do; a convolution alone does not: over
    some seconds their ratio was found to vary by 1 %, that to a convolution by 2 %.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_for(device)
        images = torch.ones(REFERENCE_BATCH[device.type], 3, 32, 32, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._weights = [
            torch.full(shape, 0.01, device=device, requires_grad=True)  # no random number is drawn
            for shape in ((32, 3, 3, 3), (64, 32, 3, 3), (10, 64))
        ]
        self._run()

    def seconds(self) -> float:
        """Return how long it takes now."""
        self._clock.mark()
        self._run()
        self._clock.mark()
        return sum(self._clock.take())

    def _run(self) -> None:
        first, second, last = self._weights
        features = functional.conv2d(self._images, first, padding=1).relu()
        features = functional.max_pool2d(features, 2)
        features = functional.conv2d(features, second, padding=1).relu()
        loss = (features.mean((2, 3)) @ last.t()).square().sum()
        torch.autograd.grad(loss, self._weights)
