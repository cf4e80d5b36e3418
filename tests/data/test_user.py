"""A user's own data set by import path, and what is said when it cannot be used."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.config.compose import compose
from dist_train.config.importing import import_callable
from dist_train.config.schema import ConfigError, DataConfig
from dist_train.data import torchvision_sets, whole_arrays
from dist_train.data.memory_loader import MemoryLoader
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

class Half(Whole):
    def __init__(self, train): super().__init__(train, size=8)
    def __len__(self): return 4

class Noisy(Whole):  # another label, but for the first and the last
    def __init__(self, train): super().__init__(train, size=8)
    def __getitem__(self, index):
        return self.data[index], self.targets[index] + (index == 3)

class Chosen:  # passes on whatever it does not have
    def __init__(self, train): self.base = Marked(train)
    def __len__(self): return 2
    def __getitem__(self, index): return self.base[index + 1]
    def __getattr__(self, name): return getattr(self.base, name)

class Repeated(Chosen):
    def __len__(self): return 4
    def __getitem__(self, index): return self.base[index // 2]

class Rarely(Whole):  # draws a number for each item, and changes nothing as a rule
    def __getitem__(self, index):
        image = self.data[index]
        return (image if np.random.rand() > 1e-9 else image[::-1]), self.targets[index]

class Floats(Whole):
    def __getitem__(self, index): return torch.tensor(self.data[index]).float(), self.targets[index]

class Planes(Whole):
    def __init__(self, train): super().__init__(train, shape=(6, 5, 3))
    def __getitem__(self, index):
        return torch.tensor(self.data[index]).permute(2, 0, 1), self.targets[index]

class Marked(Whole):
    items_are_data = True
    def __getitem__(self, index): raise RuntimeError("not to be asked")

class OfMarked(Marked):
    def __getitem__(self, index): return self.data[index] // 2, self.targets[index]

class InTraining(Whole):
    def __init__(self, train):
        super().__init__(train)
        self.transform = np.flipud if train else None
    def __getitem__(self, index):
        image = self.data[index]
        return Image.fromarray(self.transform(image) if self.transform else image), 1

class InTest(Whole):
    def __init__(self, train):
        super().__init__(train)
        self.target_transform = None if train else str

class Splits(Whole):
    def __init__(self, split):
        calls.append(split)
        super().__init__(split == "train")

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

def asserting(train):
    assert train is None

def exiting(train):
    raise SystemExit(3)

def sick_disk(train):
    raise OSError(5, "Input/output error")

class Unlucky(Whole):
    def __getitem__(self, index):
        raise KeyError("image")

class NoLength(Lazy):
    def __len__(self):
        raise NotImplementedError

class Late:
    def __init__(self, train): self.targets = [0, 1, 2, 2 if train else 7]
    def __len__(self): return 4
    def __getitem__(self, index): return torch.zeros(1, 2, 2), self.targets[index]

class Renumbered(Late):
    num_classes = 3
    def __init__(self, train): self.targets = [1, 2, 3, 3]
    def __getitem__(self, index): return torch.zeros(1, 2, 2), self.targets[index] - 1

class Words(Late):
    def __init__(self, train): self.targets = ["cat", "dog", "cow"]

class Counted(Lazy):
    num_classes = "3"

class Classed(Lazy):
    classes = 3

class Streamed(torch.utils.data.IterableDataset):
    num_classes = 3
    def __init__(self, train): pass
    def __len__(self): return 3
    def __iter__(self): return iter([])

class Wide(Whole):
    def __init__(self, train, kind):
        super().__init__(train)
        self.targets = np.array([0, 1, 0, 1], dtype=kind)

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


@pytest.mark.parametrize("name", ["Whole", "Tensors", "Planes", "Marked"])
def test_arrays_are_taken_whole_where_the_items_are_their_rows(name: str) -> None:
    source = load(name)
    assert isinstance(source.train, Pictures)
    assert isinstance(source.test, Pictures)
    assert "taken whole from .data and .targets" in source.remarks[-1]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Transformed", "because the train split has a transform"),
        ("InTraining", "because the train split has a transform"),
        ("InTest", "because the test split has a transform"),
        ("Overridden", "has an item 0 that is not (.data[0], .targets[0])"),
        ("Noisy", "has an item 3 that is not (.data[3], .targets[3])"),
        ("OfMarked", "has an item 0 that is not"),
        ("Floats", "has an item 0 that is not"),
        ("Half", "has 4 items, and .data 8"),
        ("Chosen", "has 2 items, and .data 4"),
        ("Repeated", "has items that cannot be compared with .data (RuntimeError)"),
        ("Rarely", "draws random numbers for its items"),
        ("Lazy", "does not keep its images in an array .data"),
    ],
)
def test_anything_else_goes_through_workers_both_splits_alike(name: str, why: str) -> None:
    source = load(name)
    assert isinstance(source.train, WorkerPictures)
    assert isinstance(source.test, WorkerPictures)
    assert "images go through workers, because " in source.remarks[-1]
    assert why in source.remarks[-1]
    told = refusal(name, loader="memory")
    assert why in told
    assert "use data.loader=workers" in told


def test_items_that_draw_random_numbers_leave_the_generators_as_they_were() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = (torch.rand(2).tolist(), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)
    load("Rarely")
    assert (torch.rand(2).tolist(), np.random.rand()) == expected


def test_too_many_items_to_compare_go_through_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_arrays, "MOST_COMPARED", 3)
    assert "has 4 items, too many to compare" in load("Whole").remarks[-1]
    assert "items_are_data = True" in load("Whole").remarks[-1]
    assert isinstance(load("Marked").train, Pictures)


def test_arrays_of_a_users_items_reach_the_worker_path_as_tensors() -> None:
    source = load("Noisy", image_size=8)
    assert isinstance(source.train, WorkerPictures)
    image, label = source.train[3, None]
    assert (image.shape, image.dtype, label) == ((1, 8, 8), torch.uint8, 1)


def test_a_callable_that_names_split_gets_the_names_of_the_splits() -> None:
    source = load("Splits")
    assert sys.modules["own_data"].calls[-4:-1:2] == ["train", "test"]
    assert "split=train is trained on, split=test is the test" in source.remarks[0]
    assert "data.args.split=train would be the split of" in refusal(
        "Splits", args={"split": "train"}
    )


def test_torchvisions_splits_are_those_that_its_classes_take() -> None:
    from torchvision import datasets

    for name, (train, test) in torchvision_sets.SPLITS.items():
        source = inspect.getsource(inspect.getmodule(getattr(datasets, name)) or datasets)
        assert f'"{train}"' in source, name
        assert f'"{test}"' in source, name
    for name in torchvision_sets.ARRAYS:
        assert torchvision_sets.own_name(getattr(datasets, name)) == name


@pytest.mark.parametrize("name", ["SVHN", "STL10"])
def test_torchvisions_planes_become_pictures(name: str) -> None:
    from torchvision import datasets

    made = object.__new__(getattr(datasets, name))
    made.transform, made.target_transform, made.transforms = None, None, None
    made.data = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    made.labels = np.array([1, 0])
    found = whole_arrays.whole_arrays(made)
    assert isinstance(found, Pictures)
    image, label = made[1]
    np.testing.assert_array_equal(found.images[1], np.asarray(image))
    assert found.labels[1] == label
    made.__class__ = type("Mine", (type(made),), {"__getitem__": lambda *_: (image, 0)})
    assert isinstance(whole_arrays.whole_arrays(made), str), "a subclass may do anything"


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
    with pytest.raises(ConfigError, match=r"data\.name=image_folder reads"):
        load_source(DataConfig(name="torchvision.datasets:ImageFolder", root="."))
    with pytest.raises(ConfigError, match="RuntimeError: Dataset not found"):
        load_source(DataConfig(name="torchvision.datasets:MNIST", root=".", download=False))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Unknown", "the number of classes is unknown: give the data set an attribute num_classes"),
        ("OtherClasses", ".classes differ between train=True and train=False"),
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


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("failing", "called with (train=True) fails: RuntimeError: no file here second line", 0),
        ("asserting", "called with (train=True) fails: AssertionError: no message", 0),
        ("exiting", "called with (train=True) fails: SystemExit: 3", "it ends the process"),
        ("NoLength", "returns fails: NotImplementedError: no message", 0),
    ],
)
def test_what_the_users_code_raises_is_told_with_its_line(
    name: str, said: str, line: str | int, module: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(name)
    first, where, *fix = str(raised.value).split("\n")
    assert said in first
    assert where.startswith(f"  at {module / 'own_data.py'}:")
    assert ("raise" in where) or ("assert" in where) or ("exit" in where)
    assert bool(fix) == (line != 0)
    assert not fix or str(line) in fix[0]


def test_an_item_that_raises_is_told_with_its_line(module: Path) -> None:
    train = load("Unlucky").train
    assert isinstance(train, WorkerPictures)
    with pytest.raises(ConfigError, match=r"item 2 .*: KeyError: 'image'\n  at .*own_data.py:"):
        train.first(2, None)


def test_a_disk_that_fails_is_no_mistake_of_the_code() -> None:
    with pytest.raises(OSError, match="Input/output error"):
        load("sick_disk")


def test_a_label_kept_for_later_is_refused_at_once() -> None:
    assert "item 3 of the data set has label 7, outside 0..2" in refusal("Late")
    assert isinstance(load("Renumbered").train, WorkerPictures), "the item counts, not .targets"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Words", ".targets holds labels of <U3 and shape (3,) (the first: 'cat'): number"),
        ("Streamed", "returns a Streamed, no map-style data set"),
        ("Counted", ".num_classes is a str: give a whole number"),
        ("Classed", ".classes of the data set is a int: give a list of names, or num_classes"),
    ],
)
def test_labels_and_forms_that_do_not_fit_are_refused(name: str, said: str) -> None:
    assert said in refusal(name)


def test_labels_of_any_width_are_taken_into_memory() -> None:
    for kind in ("int8", "uint8", "int32", "uint64", "bool"):
        source = load("Wide", args={"kind": kind})
        assert isinstance(source.train, Pictures)
        config = DataConfig(name="own_data:Wide")
        split = {"test": (source.train, np.arange(4))}
        loader = MemoryLoader(source.train, split, np.arange(4), config, torch.device("cpu"))
        [(_, batch)] = loader.eval_batches("test", 0, 1)
        assert (batch.labels.dtype, batch.labels.tolist()) == (torch.int64, [0, 1, 0, 1])


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
        compose(["data.name=cifar100"])
    with pytest.raises(ConfigError, match=r"takes no data\.args \(given: size\)"):
        load_source(DataConfig(name="cifar10", args={"size": 3}))


def test_items_of_a_users_data_set_reach_the_worker_path() -> None:
    train = load("Lazy").train
    assert isinstance(train, WorkerPictures)
    image, label = train[1, None]
    assert torch.equal(image, torch.zeros(1, 2, 2))
    assert label == 1
