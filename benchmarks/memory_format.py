"""What lying channels last gains on this CPU: `python -m benchmarks run memory_format`.

Forward and backward of whole nets in both forms, in turns, in one thread: each ratio is of one
pair, of the CPU's time, so that a machine in use is measured, too. It is what model.memory_format
goes by where it is auto.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from benchmarks.intervals import mean_and_half_width
from dist_train.device import keep_freed_memory
from dist_train.memory_format import FORMATS, laid_out, lay_out, memory_format_in_force
from dist_train.models import resnet9, resnet18_cifar, speed_net, tutorial_cnn

PAIRS = 5


def _small_vit(num_classes: int) -> nn.Module:
    return tv.VisionTransformer(
        image_size=96,
        patch_size=16,
        num_layers=6,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
        num_classes=num_classes,
    )


NETS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {  # the batch, the side of images
    "tutorial CNN": (tutorial_cnn, 128, 32),
    "ResNet-9, width 64": (resnet9, 32, 32),
    "the net of cifar10_speed": (speed_net, 64, 32),
    "ResNet-18 for CIFAR-10": (resnet18_cifar, 16, 32),
    "torchvision resnet18": (tv.resnet18, 16, 64),
    "torchvision resnet50": (tv.resnet50, 8, 96),
    "torchvision densenet121": (tv.densenet121, 8, 64),
    "torchvision regnet_x_400mf": (tv.regnet_x_400mf, 8, 96),
    "torchvision mobilenet_v2": (tv.mobilenet_v2, 8, 96),
    "torchvision mobilenet_v3_small": (tv.mobilenet_v3_small, 16, 96),
    "torchvision efficientnet_b0": (tv.efficientnet_b0, 8, 96),
    "torchvision convnext_tiny": (tv.convnext_tiny, 4, 96),
    "torchvision swin_t": (tv.swin_t, 4, 96),
    "a small vision transformer": (_small_vit, 16, 96),
}


def measure() -> dict[str, Any]:
    """Return milliseconds and ratios of each net in each precision."""
    torch.set_num_threads(1)
    keep_freed_memory()
    return {"nets": [_of_net(name, p) for name in NETS for p in ("fp32", "bf16")]}


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        "Forward and backward, one thread, of the CPU's time; contiguous against channels last.",
        "",
        "| net, batch, side of images | precision | channels last, ms | contiguous takes | pairs "
        "| auto |",
        "|---|---|---|---|---|---|",
    ]
    for net in found["nets"]:
        mean, half = net["times"]
        lines.append(
            f"| {net['net']} | {net['precision']} | {net['channels_last_ms']:.0f} | {mean:.2f} +- "
            f"{half:.2f} times | {net['pairs']} | {net['auto']} |"
        )
    return "\n".join(lines)


def _of_net(name: str, precision: str) -> dict[str, Any]:
    factory, batch_size, side = NETS[name]
    labels = torch.randint(10, (batch_size,))
    nets: dict[str, tuple[nn.Module, Tensor]] = {}
    for form in FORMATS:
        torch.manual_seed(0)
        module = factory(num_classes=10).train()
        lay_out(module, form)
        nets[form] = module, laid_out(torch.randn(batch_size, 3, side, side), form)
    taken: dict[str, list[float]] = {form: [] for form in FORMATS}
    for form in nets:
        _step(*nets[form], labels, precision)  # warm
    dice = random.Random(0)
    for _ in range(PAIRS):
        for form in dice.sample(list(nets), 2):
            taken[form].append(_step(*nets[form], labels, precision))
    pairs = zip(taken["contiguous"], taken["channels_last"], strict=True)
    return {
        "net": f"{name}, {batch_size}, {side}",
        "precision": precision,
        "channels_last_ms": 1000 * statistics.median(taken["channels_last"]),
        "times": mean_and_half_width([contiguous / last for contiguous, last in pairs]),
        "pairs": PAIRS,
        "auto": memory_format_in_force("auto", nets["contiguous"][0], precision, "cpu"),
    }


def _step(net: nn.Module, images: Tensor, labels: Tensor, precision: str) -> float:
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = F.cross_entropy(net(images), labels)
    loss.backward()
    net.zero_grad()
    return time.process_time() - start
