"""How much memory a step takes, and how much there is."""

import resource
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_train.cgroups import memory_left_bytes, text_of
from dist_train.config import Config

# RuntimeErrors that mean that memory is short, from allocators that know no OutOfMemoryError.
SHORT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "'out of memory'",  # in what NCCL says of CUDA
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
# cuDNN's word both for a convolution that it cannot compute and for no memory to compute it in.
NO_ENGINE = "unable to find an engine"
# Said where there is no memory for it, and where something else is wrong: a broken device.
MAYBE_SHORT = (
    NO_ENGINE,
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED",
)
# BatchNorm's word for a micro-batch of one sample: of no meaning where memory allows no more.
ONE_SAMPLE = "Expected more than 1 value per channel"
LITTLE_LEFT = 0.1  # of the GPU's memory: then it is the second
SAFETY = 0.9  # of what was found to fit: allocators fragment, pictures differ


def is_out_of_memory(error: Exception) -> bool:
    """Say whether an exception means that memory was short and the process is otherwise sound."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(word in text for word in SHORT_OF_MEMORY):
        return True
    return any(word in text for word in MAYBE_SHORT) and _little_is_left()


def _little_is_left() -> bool:
    """Say whether this process's GPU, if it has one and that answers, is nearly full."""
    if not torch.cuda.is_available():
        return False
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # it is broken
        return False
    allowed = torch.cuda.get_per_process_memory_fraction() * total  # to this process
    return min(free, allowed - torch.cuda.memory_reserved()) < LITTLE_LEFT * total


def memory_in_use(device: torch.device) -> str:
    """Return how much memory this process holds, as text for a log."""
    if device.type == "cuda":
        return torch.cuda.memory_summary(device, abbreviated=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB
    return f"peak resident memory {peak:.2f} GiB"


def bytes_per_sample(model: nn.Module, image_shape: tuple[int, int, int]) -> float:
    """Return what autograd keeps of one picture in fp32; runs a forward of two zeros."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = list(model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(2, *image_shape, device=parameters[0].device))
    return sum(n for pointer, n in kept.items() if pointer not in weights) / 2


def estimate_memory(
    model: nn.Module, image_shape: tuple[int, int, int], micro: int, precision: str, config: Config
) -> int:
    """Return the bytes of a training step: parameters, and what autograd keeps of one picture."""
    activations = bytes_per_sample(model, image_shape) * micro
    activations *= 0.5 if precision != "fp32" else 1.0
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    states = {"sgd": 1 if config.optim.momentum else 0, "muon": 1, "adamw": 2}[config.optim.name]
    copies = 2 + states + (config.optim.ema_decay is not None)
    return int(size * copies + activations)


def host_memory_left() -> int:
    """Return the bytes that this machine, container or SLURM job can still give out (Linux)."""
    lines = text_of("/proc/meminfo").splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    allowed = memory_left_bytes()
    return fields["MemAvailable"] if allowed is None else min(fields["MemAvailable"], allowed)


def largest_that_fits(most: int, attempt: Callable[[int], None]) -> int:
    """Return the largest size up to `most` that `attempt` survives; 1 at least, unproven.

    Doubles down and then closes in to within an eighth. What is found below `most` is cut by
    SAFETY.
    """

    def fits(size: int) -> bool:
        try:
            attempt(size)
        except Exception as error:
            if not is_out_of_memory(error) and not (size < most and ONE_SAMPLE in str(error)):
                raise
            error.__traceback__ = None
        else:
            return True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    if fits(most):
        return most
    bad, good = most, most // 2
    while good > 1 and not fits(good):
        bad, good = good, good // 2
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return max(1, int(SAFETY * good))
