"""A user's own data set by import path, and what is said when it cannot be used."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config.importing import import_callable
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data.pictures import Pictures
from dist_train.data.sources import load_source
from dist_train.data.splits import Source
from dist_train.data.worker_dataset import WorkerPictures

MODULE = """
import numpy as np
import torch
from PIL import Image

calls = []
constant = 3

class Whole:
    def __init__(self, train, size=4, shape=(6, 5), num_labels=None):
        calls.append(dict(train=train, size=size))
        self.data = np.arange(size * int(np.prod(shape)), dtype=np.uint8).reshape(size, *shape)
        self.targets = [i % 3 for i in range(num_labels or size)]
    def __len__(self):
        return len(self.data)
    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), self.targets[index]

class Tensors(Whole):
    def __init__(self, train):
        super().__init__(train, shape=(6, 5, 3))
        self.data, self.targets = torch.tensor(self.data), torch.tensor(self.targets)
        self.classes = ["a", "b", "c", "d"]
    def __getitem__(self, index):
        return self.data[index], int(self.targets[index])

class Transformed(Whole):
    transform = str

class Overridden(Whole):
    def __getitem__(self, index):
        return torch.zeros(1, 2, 2), 0

class Rooted(Whole):
    def __init__(self, root, train=True, download=False):
        calls.append(dict(root=root, download=download))
        super().__init__(train)

class Lazy:
    num_classes = 3
    def __init__(self, train): pass
    def __len__(self): return 2
    def __getitem__(self, index): return torch.zeros(1, 2, 2), index

class Unknown(Lazy):
    num_classes = None

class OtherClasses(Lazy):
    def __init__(self, train): self.classes = ["a", "b"] if train else ["b", "a"]

class Wrong(Whole):
    def __init__(self, train):
        super().__init__(train)
        self.classes = ["a", "b"]

def failing(train):
    raise RuntimeError("no file here\\nsecond line")

def nothing(train): return None
def empty(train): return []
def no_train(): return [(torch.zeros(1, 2, 2), 0)]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file `own_data.py`, in the current directory and in no other place."""
    (tmp_path / "own_data.py").write_text(MODULE)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "broken.py").write_text("import own_data\n\nvalue = {}['key']\n")
    (tmp_path / "pkg" / "needy.py").write_text("import surely_not_installed\n")
    (tmp_path / "pkg" / "syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    importlib.invalidate_caches()
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("own_data", "pkg")]:
        del sys.modules[name]


def load(name: str, **settings: Any) -> Source:
    return load_source(DataConfig(name=f"own_data:{name}", **settings))


def refusal(name: str, **settings: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        load(name, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_data_and_targets_become_pictures_in_memory() -> None:
    source = load("Whole", args={"size": 5})
    assert isinstance(source.train, Pictures)
    assert source.train.images.shape == (5, 6, 5, 1)
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1]
    assert (source.name, source.classes) == ("own_data:Whole", ("0", "1", "2"))


def test_tensors_become_pictures_and_classes_are_kept() -> None:
    source = load("Tensors")
    assert isinstance(source.train, Pictures)
    assert source.train.images.shape == (4, 6, 5, 3)
    assert source.classes == ("a", "b", "c", "d")


@pytest.mark.parametrize("name", ["Transformed", "Overridden", "Lazy"])
def test_anything_else_goes_through_workers(name: str) -> None:
    assert isinstance(load(name).train, WorkerPictures)
    assert "loader=workers" in refusal(name, loader="memory")


def test_root_and_download_are_passed_only_if_asked_for(tmp_path: Path) -> None:
    load("Rooted", root="somewhere", download=False)
    load("Whole", root="somewhere")
    calls = sys.modules["own_data"].calls
    assert calls[0] == {"root": "somewhere", "download": False}
    assert "own_data:Rooted needs a root: set data.root" in refusal("Rooted")


def test_torchvision_data_sets_fit_the_contract() -> None:
    name = "torchvision.datasets:FakeData"  # takes no train
    with pytest.raises(ConfigError, match="unexpected keyword argument 'train'"):
        load_source(DataConfig(name=name))
    with pytest.raises(ConfigError, match="RuntimeError: Dataset not found"):
        load_source(DataConfig(name="torchvision.datasets:MNIST", root=".", download=False))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Unknown", "the number of classes is unknown: give the data set an attribute num_classes"),
        ("OtherClasses", ".classes differ between train=True and train=False"),
        ("failing", "fails: RuntimeError: no file here ("),
        ("nothing", "returns a NoneType, no map-style data set"),
        ("empty", "returns an empty data set"),
        ("no_train", "unexpected keyword argument 'train'"),
        ("Wrong", "label 2 at index 2, outside 0..1"),
        ("Whol", "own_data.py has no 'Whol'; did you mean 'Whole'?"),
        ("constant", "own_data:constant is a int"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(name: str, told: str) -> None:
    assert told in refusal(name)


def test_wrong_arguments_are_said_in_one_line() -> None:
    assert "unexpected keyword argument 'sise'" in refusal("Whole", args={"sise": 3})
    assert "4 pictures but labels of shape (3,)" in refusal("Whole", args={"num_labels": 3})


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("own_data", "must have the form package.module:callable"),
        ("own_dta:Whole", "there is no module 'own_dta' in .*did you mean 'own_data'"),
        ("pkg.brokn:f", "there is no module 'pkg.brokn' in pkg .*did you mean 'broken'"),
        ("own_data.sub:f", "there is no module 'own_data.sub'"),
        ("pkg.broken:f", r"importing pkg.broken fails: KeyError: 'key' \(.*broken.py:3\)"),
        ("pkg.needy:f", r"importing pkg.needy fails: ModuleNotFoundError: .*needy.py:1\)"),
        ("pkg.syntax:f", r"importing pkg.syntax fails: SyntaxError: .*syntax.py:1\)"),
    ],
)
def test_reasons_not_to_import_are_told_apart(path: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"model.factory={path}.*{told}") as raised:
        import_callable(path, "model.factory")
    assert "\n" not in str(raised.value)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        load_source(DataConfig(name="cifar100"))
    with pytest.raises(ConfigError, match=r"takes no data\.args \(given: size\)"):
        load_source(DataConfig(name="cifar10", args={"size": 3}))


def test_items_of_a_users_data_set_reach_the_worker_path() -> None:
    train = load("Lazy").train
    assert isinstance(train, WorkerPictures)
    image, label = train[1, None]
    assert torch.equal(image, torch.zeros(1, 2, 2))
    assert label == 1
