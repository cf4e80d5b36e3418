"""A folder is taken for what its shape says, or refused with the setting to give."""

from pathlib import Path

import pytest
from PIL import Image

from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.layouts import TORCHVISION, source_of
from dist_train.data.sources import load_source, needs_a_first
from dist_train.data.splits import Source


def make(root: Path, *paths: str) -> Path:
    """Make pictures of one colour each, and empty files of other names."""
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".png"):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(root / path)
        else:
            (root / path).touch()
    return root


SPLIT = ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png")
TEST = ("cat/0.png", "dog/0.png")
WHOLE = (*SPLIT, *(f"test/{path}" for path in TEST))


def load(root: Path, name: str = "auto") -> Source:
    cache_dir = str(root.parent / "cache")
    return load_source(DataConfig(name=name, root=str(root), download=False, cache_dir=cache_dir))


def refusal(root: Path, name: str = "auto") -> str:
    with pytest.raises(ConfigError) as raised:
        load(root, name)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_root_with_splits_of_class_folders_is_trained_on(tmp_path: Path) -> None:
    config = DataConfig(root=str(make(tmp_path / "mine", *WHOLE)))
    assert source_of(config) == "image_folder"
    assert not needs_a_first(config), "whoever decodes holds a lock"
    source = load(tmp_path / "mine")
    assert (source.name, source.classes) == ("image_folder", ("cat", "dog"))
    assert (len(source.train), len(source.test)) == (3, 2)
    assert source.remarks == (
        f"data.root={tmp_path / 'mine'} holds class folders: read as data=image_folder",
    )


def test_a_name_that_is_given_is_what_is_read(tmp_path: Path) -> None:
    root = make(tmp_path / "mine", *WHOLE)
    assert "CIFAR-10 is not in" in refusal(root, "cifar10")


def test_cifar10_goes_before_whatever_lies_beside_it(tmp_path: Path) -> None:
    for name in ("cifar-10-batches-py/x", "cifar-10-python.tar.gz"):
        root = make(tmp_path / name[8], *WHOLE, name)
        assert source_of(DataConfig(root=str(root))) == "cifar10"


def test_a_root_of_no_known_shape_is_where_cifar10_goes(tmp_path: Path) -> None:
    assert source_of(DataConfig(root=str(tmp_path / "nowhere"))) == "cifar10"
    assert source_of(DataConfig(root=str(make(tmp_path / "other", "notes/a.txt")))) == "cifar10"
    assert source_of(DataConfig()) == "cifar10"


@pytest.mark.parametrize("name", ["auto", "image_folder"])
@pytest.mark.parametrize(
    ("train", "test"), [("train", "val"), ("train", "valid"), ("Training", "validation")]
)
def test_other_usual_names_of_the_splits_are_taken_and_said(
    tmp_path: Path, name: str, train: str, test: str
) -> None:
    paths = [*(p.replace("train", train) for p in SPLIT), *(f"{test}/{p}" for p in TEST)]
    source = load(make(tmp_path / "mine", *paths), name)
    assert (len(source.train), len(source.test)) == (3, 2)
    assert any(remark.endswith(f"/{test} is taken for test/") for remark in source.remarks)
    assert any(f"/{train} is taken for train/" in r for r in source.remarks) == (train != "train")


def test_a_val_beside_test_is_said_to_be_unused(tmp_path: Path) -> None:
    source = load(make(tmp_path / "mine", *WHOLE, "val/cat/0.png"), "image_folder")
    assert len(source.test) == 2
    assert "mine/val is not used" in source.remarks[0]
    assert "data.val_fraction" in source.remarks[0]


def test_two_folders_that_could_be_the_test_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "mine", *SPLIT, "val/cat/0.png", "valid/cat/0.png")
    assert "no test/, and both val/ and valid/ could be it: rename" in refusal(root)


@pytest.mark.parametrize("name", ["auto", "image_folder"])
def test_class_folders_without_a_split_are_refused_with_what_to_do(
    tmp_path: Path, name: str
) -> None:
    told = refusal(make(tmp_path / "mine", "cat/0.png", "dog/0.png"), name)
    assert "class folders that belong to no split: move most of each class into train/" in told
    assert ("data.name=cifar10" in told) == (name == "auto")


@pytest.mark.parametrize("name", ["auto", "image_folder"])
def test_the_folder_that_has_the_splits_is_named(tmp_path: Path, name: str) -> None:
    make(tmp_path / "mine" / "unpacked", *WHOLE)
    inner = tmp_path / "mine" / "unpacked"
    assert f"{inner} has them: set data.root={inner}" in refusal(tmp_path / "mine", name)
    assert f"its parent has them: set data.root={inner}" in refusal(inner / "train", name)


@pytest.mark.parametrize("path", TORCHVISION)
def test_what_torchvision_keeps_is_named(tmp_path: Path, path: str) -> None:
    root = make(tmp_path / "mine", f"{path}/x" if "." not in path else path)
    for name in ("auto", "image_folder"):
        assert f"set data.name=torchvision.datasets:{TORCHVISION[path]}" in refusal(root, name)


def test_cifar10_is_named_where_class_folders_were_asked_for(tmp_path: Path) -> None:
    root = make(tmp_path / "mine", "cifar-10-batches-py/x")
    assert "it holds CIFAR-10: set data.name=cifar10" in refusal(root, "image_folder")


def test_nested_class_folders_are_refused_with_that_reason(tmp_path: Path) -> None:
    root = make(tmp_path / "mine", *WHOLE, "train/animals/cow/0.png")
    told = refusal(root)
    assert "train/animals/cow is a folder inside the class folder train/animals" in told
    assert "move them up" in told
