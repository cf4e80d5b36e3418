"""What about images a network does not take: found by giving it others."""

import torch
from torch import nn

CHANNELS = (3, 1)
SIDES = (28, 32, 64, 96, 128, 224, 256, 299, 384)  # of images that networks are made for
ADVICE = {
    1: "image.convert('L') gives colour images one channel",
    3: "image.convert('RGB') gives grey images three channels",
}


@torch.no_grad()
def what_fits(model: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Say which images a network takes that refused those of `shape`; None: none of those tried.

    Its buffers may change. A network whose forward waits for other ranks is not tried.

    Args:
        model: refuses images of `shape`.
        shape: (n, c, h, w).
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return None
    num, channels, height, width = shape
    others = [count for count in CHANNELS if count != channels]
    for count in others:
        if _takes(model, (num, count, height, width)):
            return f"it takes images of {count} channels, these have {channels}: {ADVICE[count]}"
    for count in (channels, *others):
        for side in SIDES:
            if _takes(model, (num, count, side, side)):
                has = "" if count == channels else f" and {count} channels"
                also = "" if count == channels else f", and {ADVICE[count]}"
                return (
                    f"it takes images of {side}x{side}{has}, these are {width}x{height}: "
                    f"data.image_size={side} brings them to that size (float tensors: your data "
                    f"set has to){also}"
                )
    return None


def _takes(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        model(torch.zeros(shape, device=next(model.parameters()).device))
    except (Exception, SystemExit):  # whatever the user's module raises; its first refusal is told
        return False
    return True
