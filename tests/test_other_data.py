"""Other data under the name of a run's: they are noticed, and an evaluation that is NaN too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dist_train.config.compose import compose
from dist_train.config.schema import DataConfig
from dist_train.data.content import content_of
from dist_train.data.folder_scan import PictureFile
from dist_train.data.pictures import Pictures
from dist_train.data.worker_dataset import FileItems, WorkerPictures
from dist_train.train import train
from tests.settings import small

COLOURS = {"blue": (0, 0, 200), "red": (200, 0, 0)}


def folder(root: Path, swapped: bool = False) -> Path:
    """Write a folder of images, 24 and 8 of each class; swapped: each is in the other's place."""
    for split, count in (("train", 24), ("test", 8)):
        for name, colour in COLOURS.items():
            place = root / split / name
            place.mkdir(parents=True)
            shown = tuple(reversed(colour)) if swapped else colour
            for number in range(count):
                Image.new("RGB", (12, 12), shown).save(place / f"{number}.png")
    return root


def run(run_dir: Path | None, root: Path, tmp_path: Path, capsys: Any, *words: str) -> str:
    config = compose(
        [
            "experiment=cifar10_tutorial",
            f"data.root={root}",
            "model.factory=tests.nets:plain_net",
            "train.global_batch_size=8",
            "device=cpu",
            "threads=1",
            f"data.cache_dir={tmp_path / 'cache'}",
            *([] if run_dir is None else [f"run_dir={run_dir}"]),
            *words,
        ]
    ).config
    train(config)
    return capsys.readouterr().out


def test_a_finished_run_says_that_it_was_on_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = folder(Path("one")), folder(Path("two"), swapped=True)
    run(None, one, tmp_path, capsys, "train.steps=2")
    again = run(None, one.absolute(), tmp_path, capsys, "train.steps=2")
    assert "this is a run on" not in again, "the same folder, in other words"
    told = run(None, two, tmp_path, capsys, "train.steps=2")
    [mine] = [path for path in (tmp_path / "runs").iterdir()]
    warning = told.index("this is a run on data.root=one, and the command says two")
    assert warning < told.index("test accuracy")
    assert f"/runs/{mine.name}-2 ***" in told


def test_a_resume_on_other_images_of_the_same_number_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two", swapped=True)
    run(tmp_path / "run", one, tmp_path, capsys, "train.steps=2")
    told = run(tmp_path / "run", one, tmp_path, capsys, "train.steps=3")
    assert "the data have changed" not in told
    told = run(tmp_path / "run", two, tmp_path, capsys, "train.steps=4")
    assert "the data have changed since" in told
    assert "other files, images or labels of the same number" in told


def test_what_the_digest_tells_apart(tmp_path: Path) -> None:
    images, labels = np.zeros((4, 2, 2, 3), np.uint8), np.array([0, 1, 0, 1])
    base = content_of(Pictures(images=images, labels=labels))
    assert content_of(Pictures(images=images.copy(), labels=labels.astype(np.int32))) == base
    assert content_of(Pictures(images=images, labels=labels[::-1].copy())) != base
    assert content_of(Pictures(images=images + np.uint8(1), labels=labels)) != base

    def files(name: str, label: int) -> str:
        items = FileItems(tmp_path, [PictureFile(name, label, 0, 0)])
        return content_of(WorkerPictures(items, DataConfig(), num_classes=2))

    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "b.png").write_bytes(b"1")
    first = files("a.png", 0)
    assert len({first, files("a.png", 1), files("b.png", 0)}) == 3
    (tmp_path / "a.png").write_bytes(b"22")
    assert files("a.png", 0) != first

    class Mine:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int, /) -> Any:
            raise AssertionError("it is not asked")

    assert content_of(WorkerPictures(Mine(), DataConfig(), num_classes=2)) == ""


class SpoiltStatistics(nn.Module):
    """Trains, and gives NaN when it is evaluated, as one whose running variance overflowed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(images.mean((2, 3)))
        return logits if self.training else logits * torch.nan


def test_an_evaluation_that_is_not_finite_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = "model.factory=tests.test_other_data:SpoiltStatistics"
    train(small(tmp_path, factory, "train.epochs=1"))
    told = capsys.readouterr().out
    assert "*** step 9: the loss on the val split is nan: logits overflow" in told
    assert "*** step 9: the loss on the test split is nan" in told
    assert (tmp_path / "events.jsonl").read_text().count("evaluation_not_finite") == 2
