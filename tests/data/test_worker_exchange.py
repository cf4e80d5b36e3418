"""What goes to worker processes and comes back: in words, and without running a script again."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config.schema import ConfigError, DataConfig
from dist_train.config.user_code import UserCodeError
from dist_train.data.worker_dataset import WorkerPictures
from dist_train.data.worker_exchange import InWorker, Trouble, check_sendable, collate, received
from dist_train.data.worker_loader import GREY_MEAN, GREY_STD, IMAGENET_MEAN, WorkerLoader
from tests.data.test_num_workers import SHARE

REPOSITORY = Path(__file__).parents[2]


class Kind:
    """Images of a form, items that raise, attributes that cannot be sent."""

    def __init__(self, form: str = "RGB", error: BaseException | None = None) -> None:
        self.form, self.error = form, error
        self.extra: Any = None

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if self.error is not None:
            raise self.error
        if self.form == "four":
            return torch.full((4, 9, 9), 10, dtype=torch.uint8), 1
        return Image.new(self.form, (9, 9), 51), 1


def pictures(*args: Any, **settings: Any) -> WorkerPictures:
    return WorkerPictures(Kind(*args), DataConfig(image_size=8, **settings), num_classes=3)


def loader(form: str, test_form: str | None = None, **settings: Any) -> WorkerLoader:
    config = DataConfig(image_size=8, num_workers=0, **settings)
    train, test = pictures(form), pictures(test_form or form)
    every = np.arange(6)
    return WorkerLoader(train, {"test": (test, every)}, every, config, torch.device("cpu"), SHARE)


@pytest.mark.parametrize(
    ("form", "channels", "mean", "std"),
    [("L", 1, GREY_MEAN, GREY_STD), ("four", 4, GREY_MEAN, GREY_STD), ("RGB", 3, None, None)],
)
def test_images_keep_their_channels_and_are_normalised_for_them(
    form: str, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    made = loader(form)
    [(_, batch)] = made.eval_batches("test", 0, 1)
    assert made.image_shape == (channels, 8, 8)
    assert batch.images.shape == (6, channels, 8, 8)
    assert made.some_pictures(2).shape[1] == channels
    if mean is not None and std is not None:
        value = (10 if form == "four" else 51) / 255
        expected = torch.full((channels,), (value - mean[0]) / std[0])
        torch.testing.assert_close(batch.images[0, :, 0, 0], expected)
    else:
        assert len(IMAGENET_MEAN) == channels


def test_a_mean_for_other_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mean has 2 values, the images have 3 channels"):
        loader("RGB", mean=(0.5, 0.5), std=(0.2, 0.2))
    [(_, batch)] = loader("RGB", mean=(0.2,), std=(1.0,)).eval_batches("test", 0, 1)
    torch.testing.assert_close(batch.images[0, :, 0, 0], torch.tensor([0.0, -0.2, -0.2]))


def test_splits_of_unlike_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="of the test split have 1 channels, those of training 3"):
        loader("RGB", "L")


@pytest.mark.parametrize(
    ("raised", "met", "said"),
    [
        (KeyError("image"), UserCodeError, "item 2 of the data set cannot be had: KeyError:"),
        (SystemExit(3), UserCodeError, "item 2 of the data set cannot be had: SystemExit: 3"),
        (ConfigError("a mistake"), ConfigError, "a mistake"),
        (MemoryError("no room"), MemoryError, "item 2 of the data set: no room"),
        (OSError(5, "Input/output error"), OSError, "item 2 of the data set: Input/output error"),
        (RuntimeError("CUDA error: x"), RuntimeError, "item 2 of the data set: RuntimeError: CUDA"),
    ],
)
def test_an_error_comes_back_as_what_it_was(
    raised: BaseException, met: type[Exception], said: str
) -> None:
    broken, whole = InWorker(pictures("RGB", raised)), InWorker(pictures())
    sent = collate([whole[1, None], broken[2, None], broken[3, None]])
    assert isinstance(sent, Trouble)
    with pytest.raises(met) as caught:
        list(received(iter([sent])))
    assert type(caught.value) is met
    assert said in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in caught.value.__notes__[0]
    if isinstance(raised, OSError):
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == 5


def test_what_cannot_be_sent_is_named(tmp_path: Path) -> None:
    made = pictures()
    parcel = check_sendable(made, "data.name=own:data")
    assert not parcel.needs_script
    with (tmp_path / "file").open("w") as file:
        made.items.extra = file  # pyright: ignore[reportAttributeAccessIssue] # of this test's class
        with pytest.raises(ConfigError) as raised:
            check_sendable(made, "data.name=own:data")
    assert str(raised.value).startswith(
        "data.name=own:data cannot be sent to the worker processes of data.num_workers (its "
        "attribute extra, a TextIOWrapper): TypeError: "
    )
    assert "set data.num_workers=0" in str(raised.value)


def test_arrays_are_not_copied_to_see_whether_they_can_be_sent() -> None:
    made = pictures()
    made.items.extra = [np.zeros(1 << 28, np.uint8), torch.zeros(1 << 28, dtype=torch.uint8)]  # pyright: ignore[reportAttributeAccessIssue] # of this test's class
    tracemalloc.start()
    try:
        check_sendable(made, "data.name=own:data")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 24


SCRIPT = """
from dist_train.train import train
from tests.settings import small
from tests.data.test_worker_exchange import Kind
{own}
words = ("data.args={{}}", "data.name={name}", "data.loader=workers", "data.num_workers=1")
words += ("data.image_size=12", "train.steps=1", "train.global_batch_size=4")
config = small("run", *words)
{guard}train(config)
"""
OWN = """
class Own(Kind):
    num_classes = 3
def data(train): return Own()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "name", "guard", "said"),
    [
        ("", "tests.data.test_worker_exchange:kinds", "", ""),
        (OWN, "__main__:data", 'if __name__ == "__main__": ', ""),
        (OWN, "__main__:data", "", 'put this line under if __name__ == "__main__":'),
    ],
)
def test_a_script_is_run_once_or_told_how(
    own: str, name: str, guard: str, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(own=own, name=name, guard=guard))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if not said:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("run folder:") == 1, "the script ran once"
    else:
        assert done.returncode == 1
        assert said in done.stderr.splitlines()[-1]


def kinds(train: bool) -> Kind:
    """Return a data set, as a user's own module would."""
    made = Kind()
    made.num_classes = 3  # pyright: ignore[reportAttributeAccessIssue] # as users do
    return made
