"""The mistakes of a user that show only once the ranks have started, and how to make them."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dist_train.__main__ import main
from tests.ranks import run_ranks
from tests.settings import SMALL, small

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
NET = "from tests.nets import {0}_net\ndef net(num_classes): return {0}_net(num_classes)\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """What to type, after `prepare(folder)` has made what it needs in the current folder."""

    prepare: Callable[[Path], list[str]]
    told: tuple[str, ...]  # parts of the line: what is wrong, where, how to mend it
    env: dict[str, str] = field(default_factory=dict)  # of the ranks
    lines: int = 1  # what the user's own code raises has a few


def told(folder: Path, words: list[str]) -> tuple[int, str]:
    """Call main() as this rank in `folder`; returns its exit code and all of standard error."""
    os.chdir(folder)
    sys.argv = ["dist_train", *words]
    with tempfile.TemporaryFile() as errors:
        kept = os.dup(2)
        os.dup2(errors.fileno(), 2)  # also what C++ writes
        sys.stderr = os.fdopen(os.dup(2), "w")
        try:
            code = main()
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
        errors.seek(0)
        return code, errors.read().decode()


def only_line(text: str, *, lines: int = 1) -> str:
    """Return the line (or `lines`) of an error; anything beside it fails the test."""
    start = "dist-train: error: "
    assert text.startswith(start), text
    assert text.endswith("\n"), text
    assert text.count("\n") == lines, text
    return text[len(start) : -1]


def trained(folder: Path, *words: str) -> Path:
    """Return the folder of a run that two ranks have trained for two steps."""
    run_dir = folder / "before"
    config = small(run_dir, "train.steps=2", "checkpoint.every_steps=1", *words)
    run_ranks(_train_in, 2, folder, config)
    return run_dir


def _train_in(folder: Path, config: object) -> None:
    from dist_train.train import train

    os.chdir(folder)
    train(config)  # pyright: ignore[reportArgumentType]  # a Config, pickled


def _small(run_dir: Path, *words: str) -> list[str]:
    return [*SMALL, f"run_dir={run_dir}", "train.steps=2", *words]


def _pictures(folder: Path) -> list[str]:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "pictures" / split / name).mkdir(parents=True)
            for number in range(8):
                picture = Image.effect_noise((16, 16), 80).convert("RGB")
                picture.save(folder / "pictures" / split / name / f"{number}.jpg")
    words = [word for word in SMALL if not word.startswith("data.")]
    where = [f"data.root={folder / 'pictures'}", f"data.cache_dir={folder / 'cache'}"]
    return [*words, "data.name=image_folder", *where, f"run_dir={folder / 'run'}"]


def _missing_root(folder: Path) -> list[str]:
    words = _pictures(folder)
    shutil.rmtree(folder / "pictures")
    return words


def _empty_class(folder: Path) -> list[str]:
    words = _pictures(folder)
    for path in (folder / "pictures/train/dog").iterdir():
        path.unlink()
    return words


def _truncated(folder: Path) -> list[str]:
    words = _pictures(folder)
    path = folder / "pictures/train/dog/3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return words


def _no_picture(folder: Path) -> list[str]:
    words = _pictures(folder)
    (folder / "pictures/test/cat/5.jpg").write_text("a diary")
    return words


def _classes_without_a_split(folder: Path) -> list[str]:
    words = _pictures(folder)
    shutil.rmtree(folder / "pictures/test")
    (folder / "pictures/train").rename(folder / "classes")
    return [*words, f"data.root={folder / 'classes'}"]


def _nested_classes(folder: Path) -> list[str]:
    words = _pictures(folder)
    for split in ("train", "test"):
        (folder / "pictures" / split / "animals").mkdir()
        (folder / "pictures" / split / "cat").rename(folder / "pictures" / split / "animals/cat")
    return words


def _root_of_one_split(folder: Path) -> list[str]:
    return [*_pictures(folder), "data.name=auto", f"data.root={folder / 'pictures' / 'train'}"]


def _no_cifar10(folder: Path) -> list[str]:
    words = [word for word in SMALL if not word.startswith("data.")]
    return [*words, f"data.cache_dir={folder / 'cache'}", "data.download=false"]


def _other_code_behind_the_factory(folder: Path) -> list[str]:
    (folder / "user_net.py").write_text(NET.format("plain"))
    run_dir = trained(folder, "model.factory=user_net:net")
    (folder / "user_net.py").write_text(NET.format("noisy"))
    return _small(run_dir, "train.steps=4", "model.factory=user_net:net")


def _checkpoints_of_another_model(folder: Path) -> list[str]:
    shutil.copytree(trained(folder) / "checkpoints", folder / "copied" / "checkpoints")
    return _small(folder / "copied", "model.factory=tests.nets:noisy_net")


def _resume_from_another_model(folder: Path) -> list[str]:
    path = trained(folder) / "checkpoints" / "step_00000002"
    return _small(folder / "new", f"resume={path}", "model.factory=tests.nets:noisy_net")


def _other_learning_rate(folder: Path) -> list[str]:
    return _small(trained(folder), "optim.lr=0.3")


def _resume_never(folder: Path) -> list[str]:
    return _small(trained(folder), "resume=never")


def _setting(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: _small(folder / "run", *words)


def _items(kind: str) -> Callable[[Path], list[str]]:
    words = [word for word in SMALL if not word.startswith("data.args.")]
    data = ("data.name=tests.user_code:Items", f"data.args.kind={kind}", "data.num_workers=1")
    whole = ("data.val_fraction=0", "train.global_batch_size=48", "train.steps=2")
    return lambda folder: [*words, *data, *whole, f"run_dir={folder / 'run'}"]


def _module(text: str) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / "user_module.py").write_text(text)
        return _small(folder / "run", "model.factory=user_module:net")

    return prepare


MISTAKES = {
    "missing data root": Mistake(
        prepare=_missing_root, told=("data.root=", "is not a folder", "train/ and test/")
    ),
    "empty class folder": Mistake(
        prepare=_empty_class,
        told=("pictures/train/dog is an empty class folder", "add pictures or remove"),
    ),
    "truncated picture": Mistake(
        prepare=_truncated,
        told=("train/dog/3.jpg cannot be decoded (", "copy it again or remove it"),
    ),
    "no picture": Mistake(
        prepare=_no_picture, told=("test/cat/5.jpg is no picture", "copy it again or remove it")
    ),
    "class folders without a split": Mistake(
        prepare=_classes_without_a_split,
        told=("classes/train is missing", "belong to no split", "into train/<class>/"),
    ),
    "class folders in class folders": Mistake(
        prepare=_nested_classes,
        told=("train/animals/cat is a folder inside the class folder", "move them up"),
    ),
    "data root that is one of the splits": Mistake(
        prepare=_root_of_one_split, told=("its parent has them: set data.root=", "/pictures")
    ),
    "CIFAR-10 that is not there": Mistake(
        prepare=_no_cifar10,
        told=("CIFAR-10 is not in ", "data.download=true", "give data=synthetic"),
    ),
    "other code behind the same factory": Mistake(
        prepare=_other_code_behind_the_factory,
        told=("step_00000002 is of another model", "set model.factory", "another run_dir"),
    ),
    "checkpoints of another model": Mistake(
        prepare=_checkpoints_of_another_model,
        told=("copied/checkpoints/step_00000002 is of another model", "another run_dir"),
    ),
    "resume from a checkpoint of another model": Mistake(
        prepare=_resume_from_another_model, told=("is of another model", "set model.factory")
    ),
    "resume from nothing": Mistake(
        prepare=_setting("resume=/nowhere/step_00000001"),
        told=("/nowhere/step_00000001", "No such file"),
    ),
    "resume with another learning rate": Mistake(
        prepare=_other_learning_rate,
        told=("optim.lr=0.3 (the run has 0.1)", "resume_allow=[optim.lr]", "another run_dir"),
    ),
    "resume=never in a used folder": Mistake(
        prepare=_resume_never, told=("resume=never", "choose another run_dir")
    ),
    "factory in no module": Mistake(
        prepare=_setting("model.factory=tests.netz:plain_net"),
        told=("no module 'tests.netz'", "did you mean 'nets'?"),
    ),
    "no such factory": Mistake(
        prepare=_setting("model.factory=tests.nets:plane_net"),
        told=("has no 'plane_net'", "did you mean 'plain_net'?"),
    ),
    "factory in other capitals": Mistake(
        prepare=_setting("model.factory=tests.nets:PLAIN_net"),
        told=("has no 'PLAIN_net'", "did you mean 'plain_net'?"),
    ),
    "package that is not installed": Mistake(
        prepare=_setting("model.factory=nosuchpackage:create_model"),
        told=(
            "there is no module 'nosuchpackage'",
            "pip install nosuchpackage",
            "in the folder of nosuchpackage.py",
        ),
    ),
    "module that needs a package": Mistake(
        prepare=_module("import cv2nosuch\n"),
        told=("No module named 'cv2nosuch'", "user_module.py:1", "pip install cv2nosuch"),
    ),
    "module that is a program": Mistake(
        prepare=_module("import sys\nsys.exit('usage: train DIR')\n"),
        told=("SystemExit: usage: train DIR", "user_module.py:2", "if __name__ == '__main__':"),
    ),
    "factory returns no module": Mistake(
        prepare=_setting("model.factory=tests.nets:no_module"),
        told=("tests.nets:no_module returned str", "must return a torch.nn.Module"),
    ),
    "factory without such an argument": Mistake(
        prepare=_setting("model.args.depth=3"),
        told=("cannot be called", "'depth'", "num_classes and model.args by name"),
    ),
    "wrong number of classes": Mistake(
        prepare=_setting("model.factory=tests.nets:thousand_classes"),
        told=("gives 1000 outputs, the data have 10 classes", "num_classes"),
    ),
    "wrong number of classes, to be seen by looking for the micro-batch": Mistake(
        prepare=_setting(
            "model.factory=tests.nets:thousand_classes", "train.micro_batch_size=auto"
        ),
        told=("gives 1000 outputs, the data have 10 classes", "num_classes"),
    ),
    "factory that raises": Mistake(
        prepare=_setting("model.factory=tests.user_code:broken_net"),
        told=(
            "tests.user_code:broken_net called with (num_classes=10",
            "KeyError: 'depth'",
            "\n  at ",
        ),
        lines=2,
    ),
    "model that raises in its first forward": Mistake(
        prepare=_setting("model.factory=tests.user_code:failing_net"),
        told=("fails on pictures of shape (", "AssertionError: no message", "assert x is None"),
        lines=3,
    ),
    "model that raises in its first backward": Mistake(
        prepare=_setting("model.factory=tests.user_code:failing_net", "model.args.late=true"),
        told=("the first step fails: ZeroDivisionError: ", "tests/user_code.py"),
        lines=2,
    ),
    "pretrained weights of other classes": Mistake(
        prepare=_setting("model.factory=torchvision.models:resnet18", "model.args.weights=DEFAULT"),
        told=("expected value 1000 but got 10", "fix: pretrained weights"),
        lines=3,
    ),
    "item that raises in a worker": Mistake(
        prepare=_items("unlucky"),
        told=("item 3 of the data set cannot be had: KeyError: 'image'", "tests/user_code.py"),
        lines=2,
    ),
    "item of another size in a worker": Mistake(
        prepare=_items("uneven"), told=("item 3 of the data set is a picture of", "make all alike")
    ),
    "data set that no worker can be sent": Mistake(
        prepare=_items("closure"), told=("(its attribute f, a function)", "set data.num_workers=0")
    ),
    "label of the test split that training lacks": Mistake(
        prepare=_items("late"), told=("item 30 of the data set has label 9, outside 0..3",)
    ),
    "fp16 without a GPU": Mistake(
        prepare=_setting("device=auto", "precision=fp16"),
        told=("precision=fp16 needs a GPU", "use precision=bf16 or fp32"),
    ),
    "an interface that is not there": Mistake(
        prepare=_setting(),
        told=("GLOO_SOCKET_IFNAME=eth99", "no network interface 'eth99'", "name one of these"),
        env={"GLOO_SOCKET_IFNAME": "eth99"},
    ),
    "no GPU": Mistake(
        prepare=_setting("device=cuda"), told=("device=cuda", "sees no GPU", "set device=cpu")
    ),
}
