"""A rank's part of a global batch on its device, and the mixing of pictures with partners.

Legend: n pictures, c channels, h height, w width.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.memory_format import laid_out
from dist_train.order import StepShare, sample_uniform, seed_of
from dist_train.pinned import pinned

GROUP = 8  # a mixing partner comes from the same aligned group of positions


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Pictures and labels of this rank."""

    images: Tensor  # (n, c, h, w) float32
    labels: Tensor  # (n,) int64
    partner_labels: Tensor | None = None  # (n,) int64, if mixed
    own_weight: Tensor | None = None  # (n,) float32, weight of `labels` in the loss
    first_position: int = 0  # of the first picture within the global batch
    global_size: int = 0  # pictures of this step over all ranks

    def __len__(self) -> int:
        return len(self.labels)

    def in_form(self, name: str) -> "Batch":
        """Return the batch with its images in a form of memory_format.FORMATS."""
        images = laid_out(self.images, name)
        return self if images is self.images else replace(self, images=images)

    def part(self, first: int, last: int) -> "Batch":
        """Return the micro-batch of pictures [first, last)."""
        if first == 0 and last == len(self):
            return self
        partners, weights = self.partner_labels, self.own_weight
        return Batch(
            images=self.images[first:last],
            labels=self.labels[first:last],
            partner_labels=None if partners is None else partners[first:last],
            own_weight=None if weights is None else weights[first:last],
            first_position=self.first_position + first,
            global_size=self.global_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """Who is mixed with whom: a function of (seed, generation, step) and the global positions."""

    positions: np.ndarray  # (m,) that must be loaded: the rank's own, then foreign partners
    partner: np.ndarray  # (n,) rows of `positions`
    weight: np.ndarray  # (n,) float32, of the own picture
    boxes: np.ndarray | None  # (n, 2) float64, centre of cutmix's rectangle as a fraction; or None


def plan_mixing(config: DataConfig, share: StepShare, *, seed: int, generation: int) -> Mixing:
    """Choose partners, weights and rectangles for a rank's share.

    mixup: Zhang et al. 2018, arXiv:1710.09412; cutmix: Yun et al. 2019, arXiv:1905.04899. With
    both on, each step takes one of them.
    """
    key = seed_of(seed, generation, share.step, 2)
    step_draw = sample_uniform(key, np.array([-1]), 1)[0, 0]
    cut = config.cutmix > 0 and (config.mixup == 0 or step_draw < 0.5)
    alpha = config.cutmix if cut else config.mixup
    groups = share.positions // GROUP
    start = groups * GROUP
    size = np.minimum(GROUP, share.global_size - start)
    draw = sample_uniform(key, groups, 3)  # shift, and the rectangle's centre
    shift = np.where(size > 1, 1 + (draw[:, 0] * (size - 1)).astype(np.int64), 0)
    partner_position = start + (share.positions - start + shift) % size
    foreign = np.setdiff1d(partner_position, share.positions)
    positions = np.concatenate([share.positions, foreign])
    row_of = {int(position): row for row, position in enumerate(positions)}
    weight_of = {
        int(g): np.random.Generator(np.random.Philox(key=[key, int(g)])).beta(alpha, alpha)
        for g in np.unique(groups)
    }
    return Mixing(
        positions=positions,
        partner=np.array([row_of[int(p)] for p in partner_position], dtype=np.int64),
        weight=np.array([weight_of[int(g)] for g in groups], dtype=np.float32),
        boxes=draw[:, 1:] if cut else None,
    )


def mix(images: Tensor, labels: Tensor, mixing: Mixing, share: StepShare) -> Batch:
    """Mix loaded pictures with their partners.

    Args:
        images: (m, c, h, w) float32, the pictures of `mixing.positions`.
        labels: (m,) int64.
        mixing: from plan_mixing.
        share: the rank's share; its n pictures are the first n rows.
    """
    count, device = len(share.positions), images.device
    partner, weight = copied_to(device, mixing.partner), copied_to(device, mixing.weight)
    own, other = images[:count], images[partner]
    if mixing.boxes is None:
        w = weight.view(-1, 1, 1, 1)
        mixed = own * w + other * (1 - w)
    else:
        inside = _rectangle(copied_to(device, mixing.boxes), weight, own.shape)
        mixed = torch.where(inside[:, None], other, own)
        weight = 1 - inside.float().mean(dim=(1, 2))  # the area that was really replaced
    return Batch(
        images=mixed,
        labels=labels[:count],
        partner_labels=labels[partner],
        own_weight=weight,
        first_position=share.first_position,
        global_size=share.global_size,
    )


def copied_to(device: torch.device, array: np.ndarray) -> Tensor:
    """Return an array as a tensor on the device; waits only where no memory can be pinned."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    # Pageable memory would wait, and what has gaps goes through such.
    return pinned(tensor.contiguous()).to(device, non_blocking=True)


def _rectangle(centre: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """Return (n, h, w) bool: rectangles of area 1 - weight around `centre`, cut at the edges."""
    sides = []
    for dim, fraction in ((2, centre[:, 0]), (3, centre[:, 1])):
        half = (0.5 * (1 - weight).sqrt() * shape[dim]).view(-1, 1)
        middle = (fraction.float() * shape[dim]).view(-1, 1)
        pixel = torch.arange(shape[dim], device=centre.device).float() + 0.5
        sides.append((pixel >= middle - half) & (pixel < middle + half))
    return sides[0][:, :, None] & sides[1][:, None, :]
