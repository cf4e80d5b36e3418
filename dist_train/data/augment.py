"""Crop, flip and cutout of whole batches: where each picture is cut, and the two ways to do it.

On a GPU one gather does it all. On a CPU rows and columns are moved as blocks of bytes and the
result normalised while it is in the cache: several times as fast there. Both have the same bits.

Legend: n pictures, h height, w width, c channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_train.config import DataConfig

CACHED_BYTES = 1 << 19  # of float32: what is normalised at once stays in a core's own cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """What is done to each picture; (n,) int64 each, `flip` bool; None: not done to any."""

    top: np.ndarray | None  # of the crop, in pixels of the picture; outside of it is mirrored
    left: np.ndarray | None
    flip: np.ndarray | None
    hole_top: np.ndarray | None  # of cutout's square
    hole_left: np.ndarray | None


def draw_cuts(
    config: DataConfig,
    draw: np.ndarray,
    height: int,
    width: int,
    flipped_first: np.ndarray | None = None,
) -> Cuts:
    """Turn random numbers, (n, 5) in [0, 1), into cuts.

    Args:
        config: which of them are done.
        draw: one row a picture.
        height: of the pictures.
        width: of the pictures.
        flipped_first: (n,) bool, for data.flip=alternating: whether each is flipped this time.
    """
    draw = draw.astype(np.float32)
    top = left = flip = hole_top = hole_left = None
    if config.crop_padding:
        choices = np.float32(2 * config.crop_padding + 1)
        top = (draw[:, 0] * choices).astype(np.int64) - config.crop_padding
        left = (draw[:, 1] * choices).astype(np.int64) - config.crop_padding
    if config.flip:
        flip = draw[:, 2] < 0.5 if flipped_first is None else flipped_first
    if config.cutout:
        hole_top = (draw[:, 3] * np.float32(height)).astype(np.int64) - config.cutout // 2
        hole_left = (draw[:, 4] * np.float32(width)).astype(np.int64) - config.cutout // 2
    return Cuts(top=top, left=left, flip=flip, hole_top=hole_top, hole_left=hole_left)


class Normaliser:
    """(x / 255 - mean) / std, as one fused multiply-add a pixel."""

    def __init__(
        self,
        mean: list[float] | tuple[float, ...],
        std: list[float] | tuple[float, ...],
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        """Prepare for pictures of `shape` (h, w, c); mean and std have 1 or c values, 0..1."""
        std_t, mean_t = torch.tensor(std, device=device), torch.tensor(mean, device=device)
        self._scale = (1 / (255 * std_t)).expand(shape).contiguous()
        self._shift = (-mean_t / std_t).expand(shape).contiguous()

    def __call__(self, pixels: Tensor) -> Tensor:
        """(n, h, w, c) uint8 -> (n, c, h, w) float32, channels last in memory."""
        if pixels.is_cuda:
            images = torch.addcmul(self._shift, pixels.float(), self._scale)
            return images.permute(0, 3, 1, 2)
        images = torch.empty(pixels.shape)
        size = max(1, CACHED_BYTES // (4 * self._shift.numel()))
        for source, target in zip(pixels.split(size), images.split(size), strict=True):
            torch.addcmul(self._shift, source.float(), self._scale, out=target)
        return images.permute(0, 3, 1, 2)


def augmented_on_host(
    pictures: np.ndarray, indices: np.ndarray, cuts: Cuts, cutout: int, normalise: Normaliser
) -> Tensor:
    """Return (n, c, h, w) float32 of the pictures `indices`, on the CPU, channels last.

    Args:
        pictures: (num, h, w, c) uint8.
        indices: (n,) int64.
        cuts: crops reach at most h - 1 and w - 1 pixels beyond the edges.
        cutout: side of the square that is set to the mean.
        normalise: of these pictures.
    """
    chosen = pictures[indices] if cuts.top is None else _cropped(pictures, indices, cuts)
    if cuts.flip is not None:
        rows = np.flatnonzero(cuts.flip)
        upright = torch.from_numpy(chosen[rows]).permute(0, 3, 1, 2)
        chosen[rows] = upright.flip(3).permute(0, 2, 3, 1).numpy()  # vectorised in this layout
    images = normalise(torch.from_numpy(chosen))
    if cuts.hole_top is not None and cuts.hole_left is not None:
        pixels = images.permute(0, 2, 3, 1).numpy()
        corners = zip(cuts.hole_top.tolist(), cuts.hole_left.tolist(), strict=True)
        for picture, (top, left) in zip(pixels, corners, strict=True):
            picture[max(top, 0) : top + cutout, max(left, 0) : left + cutout] = 0.0
    return images


def augmented_on_device(
    pictures: Tensor, rows: Tensor, cuts: Tensor, config: DataConfig, normalise: Normaliser
) -> Tensor:
    """Return (n, c, h, w) float32 of the pictures `rows`, channels last; does not wait.

    Args:
        pictures: (num, h, w, c) uint8.
        rows: (n,) int64.
        cuts: (5, n) int64, as packed_cuts returns them.
        config: which of the cuts are done.
        normalise: of these pictures.
    """
    height, width, device = pictures.shape[1], pictures.shape[2], pictures.device
    top, left, flip, hole_top, hole_left = cuts[:, :, None]
    y = torch.arange(height, device=device).expand(len(rows), height)
    x = torch.arange(width, device=device).expand(len(rows), width)
    if config.flip:
        x = torch.where(flip > 0, x.flip(1), x)
    if config.crop_padding:
        y = _mirrored(y + top, height)
        x = _mirrored(x + left, width)
    images = normalise(pictures[rows[:, None, None], y[:, :, None], x[:, None, :]])
    if config.cutout:
        pixel_y, pixel_x = torch.arange(height, device=device), torch.arange(width, device=device)
        inside_y = (pixel_y >= hole_top) & (pixel_y < hole_top + config.cutout)
        inside_x = (pixel_x >= hole_left) & (pixel_x < hole_left + config.cutout)
        images.masked_fill_((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
    return images


def packed_cuts(cuts: Cuts, count: int) -> np.ndarray:
    """Return the cuts of `count` pictures as (5, n) int64, to be copied at once; 0: not done."""
    packed = np.zeros((5, count), dtype=np.int64)
    for row, values in zip(
        packed, (cuts.top, cuts.left, cuts.flip, cuts.hole_top, cuts.hole_left), strict=True
    ):
        if values is not None:
            row[:] = values
    return packed


def _cropped(pictures: np.ndarray, indices: np.ndarray, cuts: Cuts) -> np.ndarray:
    """Return (n, h, w, c) uint8: rows are gathered, then pictures shifted sideways in groups."""
    assert cuts.top is not None
    assert cuts.left is not None
    num, height, width, channels = pictures.shape
    y = np.abs(np.arange(height) + cuts.top[:, None])
    y = np.where(y >= height, 2 * (height - 1) - y, y)
    row_of = indices[:, None] * height + y
    rows = pictures.reshape(num * height, width * channels)
    out = np.empty((len(indices), height, width, channels), np.uint8)
    for shift in range(int(cuts.left.min()), int(cuts.left.max()) + 1):
        group = np.flatnonzero(cuts.left == shift)
        source = rows[row_of[group]].reshape(len(group), height, width, channels)
        if shift == 0:
            out[group] = source
            continue
        moved = np.empty_like(source)
        if shift > 0:
            moved[:, :, :-shift] = source[:, :, shift:]
            moved[:, :, -shift:] = source[:, :, width - 1 - shift : width - 1][:, :, ::-1]
        else:
            moved[:, :, -shift:] = source[:, :, :shift]
            moved[:, :, :-shift] = source[:, :, -shift:0:-1]
        out[group] = moved
    return out


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Mirror indices beyond the edges without repeating the edge pixel."""
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.remainder(period)
    return torch.where(index >= size, period - index, index)
