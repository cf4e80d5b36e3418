"""What a user's own code raises: told with its line and a fix, and never what a machine did."""

import dataclasses
import errno
import sys
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.build import build_model
from dist_train.config import ConfigError
from dist_train.config.user_code import is_of_machine, own_frame, told, user_code
from dist_train.distributed import single_process
from tests.settings import small

MODULE = """
import json
import torch
from torch import nn

def missing(num_classes): return torch.load("weights.pt")
def lazy(num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def typo(num_classes): return nn.Linear("8", num_classes)
def in_a_library(num_classes):
    return json.loads("{")
def asserting(num_classes):
    assert num_classes == 3
def exiting(num_classes):
    raise SystemExit("usage: net.py")
def needy(num_classes):
    import surely_not_installed
def pretrained(num_classes):
    net = nn.Linear(4, num_classes)
    net.load_state_dict({"weight": torch.zeros(1000, 4), "bias": torch.zeros(1000)})
    return net
def downloading(num_classes):
    return torch.hub.load_state_dict_from_url("http://127.0.0.1:9/net-0123abcd.pth")
def short(num_classes):
    raise MemoryError("no room")
def full_disk(num_classes):
    raise OSError(28, "No space left on device")
def warning(num_classes):
    import warnings
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.warn("of " + category.__name__, category)
    return nn.Linear(4, num_classes)
def lost_device(num_classes):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "weights"))
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    return tmp_path


def build(name: str) -> Any:
    return build_model(small("run", f"model.factory={name}"), 10, single_process())


@pytest.mark.parametrize(
    ("name", "said", "line", "fix"),
    [
        ("missing", "FileNotFoundError: [Errno 2]", "torch.load(", "begin in the folder of the"),
        ("typo", "TypeError: empty(): argument 'size'", 'nn.Linear("8"', None),
        ("in_a_library", "JSONDecodeError: Expecting property", 'return json.loads("{")', None),
        ("asserting", "AssertionError: no message", "assert num_classes == 3", None),
        ("exiting", "SystemExit: usage: net.py", 'raise SystemExit("usage', "ends the process"),
        ("needy", "ModuleNotFoundError", "import surely_not", "pip install surely_not_installed"),
        ("pretrained", "size mismatch for weight", "net.load_state_dict(", "a factory of your own"),
        ("downloading", "URLError", "load_state_dict_from_url", "weights/hub/checkpoints/net-012"),
    ],
)
def test_what_a_factory_raises_is_told_with_its_line(
    name: str, said: str, line: str, fix: str | None, module: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        build(f"own_net:{name}")
    first, where, *rest = str(raised.value).split("\n")
    assert first.startswith(f"model.factory=own_net:{name} called with (num_classes=10) fails: ")
    assert said in first
    assert where.startswith(f"  at {module / 'own_net.py'}:")
    assert line in where
    assert len(rest) == (fix is not None)
    assert fix is None or fix in rest[0]


@pytest.mark.parametrize("name", ["short", "full_disk", "lost_device"])
def test_what_a_machine_does_is_no_mistake(name: str, module: Path) -> None:
    with pytest.raises((MemoryError, OSError, RuntimeError)) as raised:
        build(f"own_net:{name}")
    assert not isinstance(raised.value, ConfigError)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_library_says_of_its_next_version_is_printed_by_rank_0(
    rank: int, module: Path
) -> None:
    config = small("run", "model.factory=own_net:warning")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        build_model(config, 10, dataclasses.replace(single_process(), rank=rank))
    everything = ["of FutureWarning", "of DeprecationWarning", "of UserWarning"]
    assert [str(w.message) for w in told] == everything[2 * rank :]


def test_a_lazy_layer_is_named(module: Path) -> None:
    with pytest.raises(ConfigError, match=r"module whose 1\.weight has no shape yet: give lazy"):
        build("own_net:lazy")


def test_pretrained_weights_of_other_classes_get_their_fix(tmp_path: Path) -> None:
    words = ("model.factory=torchvision.models:resnet18", "model.args.weights=DEFAULT")
    config = small(tmp_path, *words)
    with pytest.raises(ConfigError) as raised:
        build_model(config, 10, single_process())
    assert "expected value 1000 but got 10" in str(raised.value)
    assert "fix: pretrained weights have a last layer for their own" in str(raised.value)


MACHINES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    *(OSError(n, "x") for n in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS)),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("NCCL communicator was aborted"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate`"),
    torch.AcceleratorError("CUDA error: misaligned address"),
    torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:94, unhandled system error"),
    torch.distributed.DistNetworkError("gone"),
]
USERS = [
    KeyError("x"),
    RuntimeError("shape '[3]' is invalid"),
    FileNotFoundError(errno.ENOENT, "x"),
    PermissionError(errno.EACCES, "x"),
    OSError("image file is truncated"),
    urllib.error.URLError("no network"),
    ConnectionRefusedError(errno.ECONNREFUSED, "x"),
    SystemExit(2),
]


@pytest.mark.parametrize("error", MACHINES, ids=repr)
def test_errors_of_a_machine(error: BaseException) -> None:
    assert is_of_machine(error)


@pytest.mark.parametrize("error", USERS, ids=repr)
def test_errors_of_the_users(error: BaseException) -> None:
    assert not is_of_machine(error)


def raised_by(work: Callable[[], Any]) -> BaseException:
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_who_called_this_package_is_not_blamed() -> None:
    error = raised_by(lambda: small("run", "optm.lr=1"))
    assert own_frame(error) is None, "the error is this package's own"


def test_a_message_of_many_lines_is_cut() -> None:
    def work() -> None:
        raise ValueError("\n".join(f"line {n}  of\tmany" for n in range(100)))

    first, where = told("it fails", raised_by(work)).split("\n")
    assert first.startswith("it fails: ValueError: line 0 of many line 1 of many")
    assert len(first) < 600
    assert "tests/test_user_code.py" in where


def test_a_mistake_that_was_told_already_passes() -> None:
    with pytest.raises(ConfigError, match=r"^told$"), user_code("it fails"):
        raise ConfigError("told")
