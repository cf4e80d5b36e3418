"""Parameters and buffers of unusual memory or type train as ordinary ones, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.buffers import Buffers
from dist_train.gradients import FlatGradients
from dist_train.own_memory import is_dense, make_dense
from tests.odd_nets import Cut
from tests.ranks import run_ranks
from tests.settings import small
from tests.test_resumable import in_parts, refused, trained

FIXED = "train.order=fixed train.num_shards=4"


class Alone:
    """A rank among none."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("kind", ["slice", "expanded", "dense", "apart"])
def test_a_flat_buffer_holds_the_gradients_of_parameters_with_gaps(kind: str) -> None:
    torch.manual_seed(0)
    net = Cut(4, kind=kind)
    gradients = FlatGradients(list(net.parameters()), Alone())  # pyright: ignore[reportArgumentType] # all it needs
    gradients.begin()
    net(torch.randn(8, 3, 12, 12)).square().sum().backward()
    expected = [param.grad.clone() for param in net.parameters() if param.grad is not None]
    gradients.reduce(poison=False)
    for param, grad in zip(net.parameters(), expected, strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("world_size", [0, 2])
@pytest.mark.parametrize(
    "optimizer",
    ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "muon"))],
)
def test_a_parameter_with_gaps_trains_as_the_same_made_dense(
    optimizer: str, world_size: int, tmp_path: Path
) -> None:
    digests = [
        run_ranks(
            trained,
            world_size,
            small(
                tmp_path / kind,
                f"model.args.kind={kind}",
                "model.factory=tests.odd_nets:Cut",
                f"optim.name={optimizer}",
                "train.steps=3",
            ),
        )[0]
        for kind in ("slice", "dense")
    ]
    assert digests[0] == digests[1]


def test_tied_parameters_stay_tied_and_keep_their_numbers() -> None:
    net = Cut(4, kind="tied")
    before = net.first.weight.detach().clone()
    make_dense(net)
    assert net.first.weight is net.second.weight
    assert all(map(is_dense, [*net.parameters(), *net.buffers()]))
    assert torch.equal(net.first.weight, before)
    Buffers(net).restore()  # writes into each of them


def test_two_parts_of_one_tensor_become_two_tensors() -> None:
    net = Cut(4, kind="apart")
    make_dense(net)
    first, second = (layer.weight.untyped_storage() for layer in (net.first, net.second))
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize(
    ("shape", "stride", "dense"),
    [
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((3, 4), (5, 1), False),
        ((3, 4), (0, 1), False),
        ((1, 4), (9, 1), True),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),
        ((0, 4), (9, 2), True),
        ((), (), True),
    ],
)
def test_dense_is_what_fills_its_memory(
    shape: tuple[int, ...], stride: tuple[int, ...], dense: bool
) -> None:
    assert is_dense(torch.zeros(200).as_strided(shape, stride)) is dense


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("Cut model.args.kind=shared", ("'first.weight'", "'second.weight'", ".clone()")),
        (
            "Odd model.args.kind='complex parameter'",
            ("'odd' is torch.complex64", "view_as_complex"),
        ),
        ("Odd model.args.kind='float8 parameter'", ("'odd' is torch.float8_e4m3fn", "float32")),
        ("Odd model.args.kind='sparse buffer'", ("'odd' is of layout", "in the forward")),
        ("Odd model.args.kind='unsigned buffer'", ("'odd' is torch.uint16", "int32")),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    words: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    factory, _, args = words.partition(" ")
    line = refused(tmp_path, f"model.factory=tests.odd_nets:{factory}", *([args] if args else []))
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("complex buffer", ""),
        pytest.param("complex buffer", FIXED, marks=pytest.mark.slow),
        *(
            pytest.param(kind, words, marks=pytest.mark.slow)
            for kind, words in (
                ("whole parameter", "optim.ema_decay=0.9"),
                ("frozen complex", ""),
                ("half parameter", ""),
                ("double parameter", "optim.ema_decay=0.9"),
                ("scalar parameter", ""),
                ("empty parameter", "optim.name=adamw"),
                ("short buffer", ""),
                ("boolean buffer", FIXED),
            )
        ),
    ],
)
def test_other_types_train_and_are_continued(kind: str, words: str, tmp_path: Path) -> None:
    args: list[Any] = ["model.factory=tests.odd_nets:Odd", f"model.args.kind='{kind}'"]
    expected, found = in_parts(tmp_path, 2, *args, *words.split())
    assert found == expected


def test_a_module_without_tensors_is_dense() -> None:
    make_dense(nn.Sequential())
