"""How images, filters and feature maps lie in memory: channels last where that gains."""

import torch
from torch import Tensor, nn

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def memory_format_in_force(asked: str, module: nn.Module, precision: str, kind: str) -> str:
    """Return the form for a network: of FORMATS; the same on all ranks if `precision` is.

    What contiguous takes, times channels last, on a CPU with AMX (benchmarks/RESULTS.md): networks
    of dense or grouped convolutions 0.9 to 1.5 in fp32, 1.1 to 2.2 in bf16; with depthwise ones 1.0
    to 1.35 in fp32, but 0.85 to 1.3 in bf16; attention, and patches that do not overlap, the same.
    On GPUs the units for half precision convolve channels last, and what lies otherwise is
    transposed before and after: NVIDIA's Convolutional Layers User's Guide, "Tensor Layouts".

    Args:
        asked: model.memory_format.
        module: the network.
        precision: in force, on all ranks.
        kind: of the device, cpu or cuda.
    """
    if asked != "auto":
        return asked
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if kind == "cuda":
        gains = bool(convolutions) and precision != "fp32"
    else:
        mixed = precision != "fp32" and any(map(_is_depthwise, convolutions))
        gains = any(map(_overlaps, convolutions)) and not mixed
    if gains and corrupting_layer("channels_last", module, precision, kind) is not None:
        return "contiguous"
    return "channels_last" if gains else "contiguous"


def corrupting_layer(form: str, module: nn.Module, precision: str, kind: str) -> str | None:
    """Return the name of a layer whose gradient may overwrite memory in this form; None: none may.

    On CPUs oneDNN, as in torch 2.14, writes beyond its buffers in the gradient of the weight of a
    1x1 convolution with a stride and fewer than 16 channels, in fp32 and channels last, for some
    sizes of images: glibc then ends the process, or a result is wrong.
    """
    if (form, precision, kind) != ("channels_last", "fp32", "cpu"):
        return None
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer.groups > 1 or layer.in_channels >= 16:
            continue
        if layer.kernel_size == (1, 1) and max(layer.stride) > 1:
            return name
    return None


def lay_out(module: nn.Module, name: str) -> None:
    """Bring all weights and buffers of four dimensions into a form of FORMATS."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=FORMATS[name])


def laid_out(images: Tensor, name: str) -> Tensor:
    """Return the images (n, c, h, w) in a form of FORMATS; themselves, if they have it."""
    images = images.contiguous(memory_format=FORMATS[name])
    if name == "contiguous" and images.shape[1] == 1:  # lies both ways, and strides would decide
        return images.flatten().view(images.shape)
    return images


def _overlaps(convolution: nn.Conv2d) -> bool:
    return any(k > s for k, s in zip(convolution.kernel_size, convolution.stride, strict=True))


def _is_depthwise(convolution: nn.Conv2d) -> bool:
    return 1 < convolution.groups == convolution.in_channels
