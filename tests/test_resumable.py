"""What a run saves can be loaded again, or the run is refused before its first step."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.buffers import Buffers
from dist_train.build import build_model
from dist_train.checkpoint import load_state
from dist_train.distributed import single_process
from dist_train.resumable import try_loading
from dist_train.weights import load_weights, weights_of
from tests.odd_nets import Grid, Versioned
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small

CONSTANT = ("optim.schedule=constant", "checkpoint.every_steps=1", "log_every=1")


def trained(config: Any) -> str:
    """Return the weights' digest after a training."""
    from dist_train.train import train

    return train(config)["weights_sha256"]


def in_parts(folder: Path, world_size: int, *words: str) -> tuple[str, str]:
    """Return the digests of an unbroken run of four steps, and of one in two."""
    whole = small(folder / "whole", *CONSTANT, *words, "train.steps=4")
    expected = run_ranks(trained, world_size, whole)[0]
    found = ""
    for steps in (2, 4):
        part = small(folder / "parts", *CONSTANT, *words, f"train.steps={steps}")
        found = run_ranks(trained, world_size, part)[0]
    return expected, found


def refused(folder: Path, *words: str) -> str:
    """Return the line that a training is refused with before its first step."""
    config = small(folder / "run", *CONSTANT, *words, "train.steps=2")
    with pytest.raises(AssertionError, match=r"ConfigError|NotPlainError") as caught:
        run_ranks(trained, 0, config)
    assert not list((folder / "run" / "checkpoints").glob("step_*"))
    [line] = [
        line
        for line in str(caught.value).splitlines()
        if "Error: state" in line or "ConfigError: " in line
    ]
    return line


@pytest.mark.parametrize(
    ("net", "world_size"),
    [
        ("Extra model.args.kind=numpy", 0),
        ("RunningMean", 2),
        ("Grid", 0),
        pytest.param("Versioned", 0, marks=pytest.mark.slow),
        pytest.param("Extra", 2, marks=pytest.mark.slow),
        pytest.param("RunningMean model.args.in_place=true", 2, marks=pytest.mark.slow),
        pytest.param("RunningMean train.order=fixed train.num_shards=4", 2, marks=pytest.mark.slow),
        pytest.param("RunningMean guards.lag=1", 0, marks=pytest.mark.slow),
        pytest.param("Grid", 2, marks=pytest.mark.slow),
        pytest.param("Grid train.order=fixed train.num_shards=4", 2, marks=pytest.mark.slow),
        pytest.param("Grid model.args.kind=registered", 2, marks=pytest.mark.slow),
        pytest.param("Grid model.args.kind=resized", 2, marks=pytest.mark.slow),
        pytest.param("NeedsNumbers", 0, marks=pytest.mark.slow),
    ],
)
def test_a_run_in_parts_equals_an_unbroken_one(net: str, world_size: int, tmp_path: Path) -> None:
    words = f"model.factory=tests.odd_nets:{net}".split()
    expected, found = in_parts(tmp_path, world_size, *words)
    assert found == expected


@pytest.mark.slow
def test_a_buffer_kept_by_assignment_trains_like_one_kept_in_place(tmp_path: Path) -> None:
    net = "model.factory=tests.odd_nets:RunningMean"
    digests = [
        run_ranks(trained, 2, small(tmp_path / f"{way}", net, f"model.args.in_place={way}"))[0]
        for way in ("true", "false")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (
            "Extra model.args.kind=bytes",
            ("_extra_state']['count'] is a bytes", "not be read again"),
        ),
        ("LateParameter", ("makes 'scale'", "in __init__")),
        pytest.param(
            "Extra model.args.kind=refused",
            ("ValueError: who needs extra state", "set_extra_state"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "NamedByCount",
            ("Missing key(s)", "net_", "Unexpected key(s)", "the same model each time"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "Grid model.args.kind=flag",
            ("makes buffers in its first forward", "AttributeError", "persistent=False"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_could_never_be_continued_is_refused(
    net: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    line = refused(tmp_path, *f"model.factory=tests.odd_nets:{net}".split())
    assert all(part in line for part in told), line


@pytest.mark.parametrize("call", range(1, 5))
def test_a_gpu_that_breaks_at_the_start_is_no_mistake_of_the_user(
    call: int, tmp_path: Path
) -> None:
    net = ("model.factory=tests.odd_nets:BrokenDevice", f"model.args.call={call}")
    [outcome] = start_ranks_of(trained, 0, small(tmp_path, *net, "train.steps=1"))
    assert isinstance(outcome.error, torch.AcceleratorError), outcome.trace
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 1


def state_of(name: str, *words: str) -> tuple[dict[str, Any], Any]:
    """Return what would be saved of a network as it is built, and its configuration."""
    config = small("unused", f"model.factory={name}", *words)
    model = build_model(config, 10, single_process())
    return weights_of(model, Buffers(model)), config


@pytest.mark.parametrize("name", ["tests.nets:noisy_net", "tests.odd_nets:NeedsNumbers"])
def test_the_proof_moves_no_random_generator(name: str) -> None:
    state, config = state_of(name)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert try_loading(state, config, 10, single_process()) is None
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][1])  # type: ignore[index] # its legacy form
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_proof_takes_no_memory_for_a_second_model() -> None:
    made: list[torch.device] = []
    state, config = state_of("tests.nets:plain_net")
    with pytest.MonkeyPatch.context() as patch:

        def noting(buffers: Buffers, *_: object) -> None:
            made.append(next(buffers.module.parameters()).device)

        patch.setattr(Buffers, "take_form", noting)
        assert try_loading(state, config, 10, single_process()) is None
    assert made == [torch.device("meta")]


def test_a_factory_that_works_once_is_told_and_not_refused() -> None:
    state, config = state_of("tests.odd_nets:Once")
    warning = try_loading(state, config, 10, single_process())
    assert warning is not None
    assert "called a second time, model.factory=tests.odd_nets:Once" in warning
    assert "registered already" in warning


def test_a_state_without_metadata_is_read_as_of_the_module_itself() -> None:
    model = Versioned(10)
    state = weights_of(model, Buffers(model))
    assert state["model_metadata"][""] == {"version": 2}
    del state["model_metadata"], state["buffers_made"]  # as saved before they were kept
    fresh = Versioned(10)
    load_weights(fresh, Buffers(fresh), state)
    with pytest.raises(RuntimeError, match="twice as wide"):
        Versioned(10).load_state_dict(dict(state["model"]))


def test_a_buffer_made_in_forward_is_not_taken_up_by_another_module() -> None:
    model = Grid(10)
    buffers = Buffers(model)
    model(torch.rand(2, 3, 12, 12))
    state = weights_of(model, buffers)
    assert state["buffers_made"] == {"grid": "none"}
    for kind in ("registered", "resized"):
        other = Grid(10, kind=kind)
        with pytest.raises(RuntimeError, match="grid"):
            load_weights(other, Buffers(other), state)
    fresh = Grid(10)
    load_weights(fresh, Buffers(fresh), state)
    assert torch.equal(fresh.get_buffer("grid"), model.get_buffer("grid"))


def test_a_state_from_before_a_buffer_was_made_takes_it_away() -> None:
    model = Grid(10, kind="registered")
    buffers = Buffers(model)
    state = {key: dict(value) for key, value in weights_of(model, buffers).items()}
    model(torch.rand(2, 3, 12, 12))
    load_weights(model, buffers, state)
    assert not hasattr(model, "grid")


@pytest.mark.slow
def test_a_checkpoint_is_read_by_torch_alone_and_holds_the_versions(tmp_path: Path) -> None:
    config = small(tmp_path, *CONSTANT, "model.factory=tests.odd_nets:Versioned", "train.steps=1")
    run_ranks(trained, 0, config)
    path = tmp_path / "checkpoints" / "step_00000001" / "state.pt"
    state = torch.load(path, weights_only=True)
    assert state["model_metadata"]["inner.0"] == {"version": 1}
    assert load_state(path.read_bytes()).keys() == state.keys()


@pytest.mark.slow
def test_mnasnet_can_be_continued(tmp_path: Path) -> None:
    words = ("model.factory=torchvision.models:mnasnet0_5", "data.args.image_size=32")
    expected, found = in_parts(tmp_path, 0, *words)
    assert found == expected
