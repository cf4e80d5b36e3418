"""What laying narrow feature maps side by side gains: `python -m benchmarks run narrow_conv`.

Forward and backward of whole nets, with `dist_train.models.conv3x3.Conv3x3` and with nn.Conv2d of
the same weights, in turns, in one thread: each ratio is of one pair. Only CPUs with AMX have it.
"""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.intervals import mean_and_half_width
from dist_train.device import has_amx, keep_freed_memory
from dist_train.models import resnet9, speed_net
from dist_train.models.conv3x3 import Conv3x3

NETS: dict[str, tuple[Callable[[int], nn.Module], int]] = {  # and the batch
    "the net of cifar10_speed, batch 1,000": (speed_net, 1000),
    "ResNet-9, width 32, batch 128": (lambda classes: resnet9(classes, width=32), 128),
    "ResNet-9, width 64, batch 128": (resnet9, 128),
}
PAIRS = 15


def measure() -> dict[str, Any]:
    """Return the seconds and ratios of each net; none without AMX."""
    if not has_amx():
        return {"nets": []}
    torch.set_num_threads(1)
    keep_freed_memory()
    return {"nets": [_of_net(name) for name in NETS]}


def table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    if not found["nets"]:
        return "This CPU has no AMX: nn.Conv2d is used everywhere."
    lines = [
        "Forward and backward in bf16, one thread; weights' gradients of narrow feature maps from "
        "maps laid side by side, against nn.Conv2d.",
        "",
        "| net | images/s with nn.Conv2d | here | times nn.Conv2d | pairs |",
        "|---|---|---|---|---|",
    ]
    for net in found["nets"]:
        mean, half = net["times"]
        lines.append(
            f"| {net['net']} | {net['images_per_sec_torch']:,.0f} | "
            f"{net['images_per_sec_here']:,.0f} | {mean:.2f} +- {half:.2f} | {net['pairs']} |"
        )
    return "\n".join(lines)


def _of_net(name: str) -> dict[str, Any]:
    factory, batch_size = NETS[name]
    torch.manual_seed(0)
    here = factory(10).to(memory_format=torch.channels_last)
    plain = factory(10).to(memory_format=torch.channels_last)
    _use_torchs(plain)
    plain.load_state_dict(here.state_dict())
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))
    nets = {"here": here, "torch": plain}

    def seconds(which: str) -> float:
        return _step(nets[which], images, labels)

    for which in nets:
        seconds(which)  # warm
    dice, taken = random.Random(0), {which: [] for which in nets}
    for _ in range(PAIRS):
        for which in dice.sample(list(nets), 2):
            taken[which].append(seconds(which))
    rates = {which: batch_size / statistics.median(times) for which, times in taken.items()}
    ratios = [theirs / ours for ours, theirs in zip(taken["here"], taken["torch"], strict=True)]
    return {
        "net": name,
        "images_per_sec_here": rates["here"],
        "images_per_sec_torch": rates["torch"],
        "times": mean_and_half_width(ratios),
        "pairs": PAIRS,
    }


def _step(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(images), labels)
    loss.backward()
    net.zero_grad()
    return time.perf_counter() - start


def _use_torchs(net: nn.Module) -> None:
    """Replace each Conv3x3 by nn.Conv2d."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv3x3):
                conv = nn.Conv2d(child.in_channels, child.out_channels, 3, padding=1, bias=False)
                setattr(module, name, conv.to(memory_format=torch.channels_last))
