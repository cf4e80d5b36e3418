"""The generated stand-in: deterministic, balanced, more than a linear model can learn."""

import hashlib

import numpy as np
import pytest

from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data import synthetic
from dist_train.data.pictures import Pictures
from dist_train.data.sources import load_source
from dist_train.data.splits import Source

SMALL = {"num_train": 3000, "num_test": 500}


def load(**args: object) -> Source:
    return load_source(DataConfig(name="synthetic", args=args))


def images(split: object) -> np.ndarray:
    assert isinstance(split, Pictures)
    return split.images


def test_bits_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(images(load(num_train=64, num_test=8).train).tobytes()).hexdigest()
    assert digest.startswith("33d6c8a8d3800785")


def test_default_is_of_the_size_of_cifar10() -> None:
    assert tuple(synthetic.SIZES.values()) == (50_000, 10_000, 10, 32, 3)
    images_default = images(load(num_train=2, num_test=1).train)
    assert (images_default.shape, images_default.dtype) == ((2, 32, 32, 3), np.uint8)


def test_sizes_are_arguments() -> None:
    source = load(num_train=7, num_test=5, num_classes=3, image_size=28, channels=1)
    assert images(source.train).shape == (7, 28, 28, 1)
    assert images(source.test).shape == (5, 28, 28, 1)
    assert source.num_classes == 3


def test_classes_are_balanced_and_splits_differ() -> None:
    source = load(**SMALL)
    assert isinstance(source.train, Pictures)
    assert np.bincount(source.train.labels).tolist() == [300] * 10
    assert not np.array_equal(images(source.train)[:500], images(source.test))


def test_a_linear_model_learns_little() -> None:
    source = load(**SMALL)
    assert isinstance(source.train, Pictures)
    assert isinstance(source.test, Pictures)

    def grey(pictures: Pictures) -> np.ndarray:
        flat = pictures.images.mean(-1).reshape(len(pictures), -1) / 128 - 1
        return np.concatenate([flat, np.ones((len(pictures), 1))], axis=1)

    x, y = grey(source.train), np.eye(10)[source.train.labels]
    weights = np.linalg.solve(x.T @ x + 100 * np.eye(x.shape[1]), x.T @ y)
    accuracy = np.mean((grey(source.test) @ weights).argmax(1) == source.test.labels)
    assert accuracy < 0.4


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"num_trian": 5}, "did you mean 'num_train'"),
        ({"num_train": 0}, "num_train=0 must be a whole number of 1"),
        ({"image_size": 32.5}, "image_size=32.5 must be a whole number"),
    ],
)
def test_wrong_arguments_are_refused_by_name(args: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(**args)


def test_a_folder_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.root=/mine would be ignored.*remove data.root"):
        load_source(DataConfig(name="synthetic", root="/mine"))
