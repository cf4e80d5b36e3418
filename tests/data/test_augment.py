"""The two fast ways to crop, flip and cut out, against one picture at a time, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch

from dist_train.config import DataConfig
from dist_train.data.augment import (
    Cuts,
    Normaliser,
    augmented_on_device,
    augmented_on_host,
    draw_cuts,
    packed_cuts,
)
from dist_train.data.memory_loader import MemoryLoader
from dist_train.data.pictures import Pictures
from dist_train.order import GlobalOrderSampler

MEAN, STD = [0.49, 0.48, 0.44], [0.25, 0.24, 0.26]


def pictures_of(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)


def one_by_one(
    pictures: np.ndarray, indices: np.ndarray, cuts: Cuts, config: DataConfig
) -> torch.Tensor:
    """Pad, cut, flip, normalise and blot out, as one reads it in a tutorial."""
    height, width, channels = pictures.shape[1:]
    pad = config.crop_padding
    made = []
    for number, index in enumerate(indices):
        picture = pictures[index]
        if cuts.top is not None and cuts.left is not None:
            padded = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
            top, left = cuts.top[number] + pad, cuts.left[number] + pad
            picture = padded[top : top + height, left : left + width]
        if cuts.flip is not None and cuts.flip[number]:
            picture = picture[:, ::-1]
        mean, std = torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).float()
        image = torch.addcmul(-mean / std, pixels, 1 / (255 * std))
        if cuts.hole_top is not None and cuts.hole_left is not None:
            for y in range(height):
                for x in range(width):
                    down, right = y - cuts.hole_top[number], x - cuts.hole_left[number]
                    if 0 <= down < config.cutout and 0 <= right < config.cutout:
                        image[y, x] = 0.0
        made.append(image)
    return torch.stack(made).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(32, 32, 3), (9, 14, 1), (5, 4, 3)])
@pytest.mark.parametrize(
    "config",
    [
        DataConfig(),
        DataConfig(crop_padding=3, cutout=5),
        DataConfig(crop_padding=1, flip=False, cutout=4),
        DataConfig(crop_padding=0, cutout=3),
        DataConfig(crop_padding=0, flip=False),
    ],
    ids=["default", "cutout", "no flip", "no crop", "neither"],
)
def test_both_ways_have_the_bits_of_one_picture_at_a_time(
    config: DataConfig, shape: tuple[int, int, int]
) -> None:
    if config.crop_padding >= min(shape[:2]):
        config = dataclasses.replace(config, crop_padding=2)
    pictures = pictures_of(shape)
    indices = np.random.default_rng(1).integers(0, len(pictures), 300)
    draw = np.random.default_rng(2).random((300, 5))
    cuts = draw_cuts(config, draw, *shape[:2])
    channels = shape[2]
    normalise = Normaliser(MEAN[:channels], STD[:channels], shape, torch.device("cpu"))
    expected = one_by_one(pictures, indices, cuts, config)
    host = augmented_on_host(pictures, indices, cuts, config.cutout, normalise)
    device = augmented_on_device(
        torch.from_numpy(pictures),
        torch.from_numpy(indices),
        torch.from_numpy(packed_cuts(cuts, len(indices))),
        config,
        normalise,
    )
    assert torch.equal(host, expected)
    assert torch.equal(device, expected)
    assert host.is_contiguous(memory_format=torch.channels_last)


def test_every_shift_flip_and_hole_comes_up_equally_often() -> None:
    config = DataConfig(crop_padding=4, cutout=8)
    cuts = draw_cuts(config, np.random.default_rng(3).random((90_000, 5)), 32, 32)
    for values, expected in (
        (cuts.top, range(-4, 5)),
        (cuts.left, range(-4, 5)),
        (cuts.flip, (False, True)),
        (cuts.hole_top, range(-4, 28)),
        (cuts.hole_left, range(-4, 28)),
    ):
        assert values is not None
        found, counts = np.unique(values, return_counts=True)
        assert list(found) == list(expected)
        assert np.abs(counts / counts.mean() - 1).max() < 0.1


def test_alternating_flips_show_each_picture_both_ways_in_two_epochs() -> None:
    images = pictures_of((6, 6, 3))
    pictures = Pictures(images=images, labels=np.arange(40, dtype=np.int64))
    config = DataConfig(crop_padding=0, flip="alternating", mean=tuple(MEAN), std=tuple(STD))
    loader = MemoryLoader(pictures, {}, np.arange(40), config, torch.device("cpu"))
    sampler = GlobalOrderSampler(40, global_batch_size=40, rank=0, world_size=1, seed=0)
    epochs = []
    for batch in loader.train_batches(sampler, 0, 4):
        order = batch.labels.argsort()
        epochs.append(batch.images[order])
    normalise = Normaliser(MEAN, STD, (6, 6, 3), torch.device("cpu"))
    upright = normalise(torch.from_numpy(images))
    as_is = [(epoch == upright).flatten(1).all(1) for epoch in epochs]
    assert 5 < int(as_is[0].sum()) < 35, "by chance the first time"
    assert torch.equal(as_is[1], ~as_is[0])
    assert torch.equal(epochs[1], epochs[0].flip(3))
    assert torch.equal(epochs[2], epochs[0])


def test_padding_larger_than_the_picture_mirrors_more_than_once() -> None:
    pictures = Pictures(images=pictures_of((4, 4, 3)), labels=np.zeros(40, dtype=np.int64))
    config = DataConfig(crop_padding=9, mean=tuple(MEAN), std=tuple(STD))
    loader = MemoryLoader(pictures, {}, np.arange(40), config, torch.device("cpu"))
    sampler = GlobalOrderSampler(40, global_batch_size=40, rank=0, world_size=1, seed=0)
    [batch] = loader.train_batches(sampler, 0, 1)
    found = set(batch.images.unique().tolist())
    known = Normaliser(MEAN, STD, (4, 4, 3), torch.device("cpu"))
    assert found <= set(known(torch.from_numpy(pictures.images)).unique().tolist())
