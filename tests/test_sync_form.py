"""Which form sums the gradients: chosen by what is found out, and kept by the run."""

import contextlib
import dataclasses
import gc
import signal
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train import sync_form
from dist_train.config import Config
from dist_train.config.compose import compose
from dist_train.config.identity import as_begun
from dist_train.ddp_check import Found, try_ddp
from dist_train.distributed import single_process, start_ranks
from dist_train.parallel import Form, Replica
from dist_train.state import CODE, CONTENT, check_facts
from dist_train.sync_form import choose_form
from dist_train.train import train
from tests import settings
from tests.faults import Fault, train_with
from tests.nets import plain_net
from tests.ranks import run_ranks, start_ranks_of
from tests.wrong_backends import backend

SHORT = ("train.steps=4", "model.factory=tests.nets:noisy_net")


def small(folder: Path, *words: str, tried_out: str = "once") -> Config:
    """Return a tiny training that has not found out anything yet: on GPUs that is kept."""
    return settings.small(folder, f"data.cache_dir={folder}-{tried_out}", *words)


def device_of(config: Config) -> str:
    """Return what the form depends on: a GPU where tests run on an emulated one."""
    return "cuda" if config.device == "cuda" else "cpu"


def trained(config: Config, name: str) -> dict[str, Any]:
    """Train on GPUs, as far as the choice of the form knows, through a wrong backend."""
    with backend(name), contextlib.ExitStack() as stack:
        if config.device == "cpu" and config.parallel.sync == "auto":
            stack.enter_context(mock.patch.object(sync_form, "_auto", return_value="ddp"))
        return train(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sync", "form", "told"),
    [
        ("", "auto", "ddp", "a failure in a step can be taken back: tried out in"),
        ("hangs", "auto", "flat", "cannot be trusted (rank "),
        ("hangs", "ddp", "flat", "cannot be trusted (rank "),
        ("is left out", "auto", "flat", "could not be taken back (rank "),
        ("lies", "auto", "flat", "cannot be trusted (rank "),
        ("lies", "ddp", "flat", "cannot be trusted (rank "),
        ("swallows NaN", "auto", "flat", "could not be taken back (rank "),
        ("swallows NaN", "ddp", "ddp", "parallel.sync=flat recovers"),
    ],
)
def test_training_takes_the_form_that_can_be_trusted(
    name: str, sync: str, form: str, told: str, tmp_path: Path
) -> None:
    config = small(tmp_path / "run", *SHORT, f"parallel.sync={sync}")
    summaries = run_ranks(trained, 2, config, name)
    assert {s["sync"] for s in summaries} == {form}
    assert told in (tmp_path / "run" / "log" / "rank0.txt").read_text()
    plain = small(tmp_path / "plain", *SHORT, f"parallel.sync={form}")
    [same] = {s["weights_sha256"] for s in run_ranks(train, 2, plain)}
    assert {s["weights_sha256"] for s in summaries} == {same}


def test_on_cpus_nothing_is_tried_out_on_gpus_ddp_is(tmp_path: Path) -> None:
    config = small(tmp_path, *SHORT)
    found = run_ranks(counting, 2, config)
    assert found == [{"cpu": ("flat", 0), "cuda": ("ddp", 1)}[device_of(config)]] * 2


def counting(config: Config) -> tuple[str, int]:
    with mock.patch.object(sync_form, "try_ddp", wraps=try_ddp) as trial:
        return train(config)["sync"], trial.call_count


@pytest.mark.parametrize(
    ("device", "world_size", "before", "chosen"),
    [
        ("cpu", 2, {}, "flat"),
        ("cuda", 2, {}, "ddp"),
        ("cuda", 1, {}, "flat"),
        ("cuda", 2, {"world_size": 2, "parallel.sync": "flat"}, "flat"),
        ("cpu", 2, {"world_size": 2, "parallel.sync": "ddp"}, "ddp"),
        ("cpu", 2, {"world_size": 2, "parallel.sync": "overlap"}, "ddp"),
        ("cuda", 2, {"world_size": 1, "parallel.sync": "flat"}, "ddp"),
        ("cpu", 2, {"world_size": 4, "parallel.sync": "ddp"}, "flat"),
        ("cuda", 2, {"world_size": 2, "parallel.sync": "fixed"}, "ddp"),
    ],
)
def test_auto_is_what_the_run_began_with_or_the_devices(
    device: str, world_size: int, before: dict[str, Any], chosen: str
) -> None:
    ranks = dataclasses.replace(
        single_process(), world_size=world_size, device=torch.device(device)
    )
    assert sync_form._auto(ranks, before) == chosen


def test_an_answer_of_gpus_is_kept_and_counts_where_all_ranks_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings.small(tmp_path / "run", "device=cpu")
    assert run_ranks(with_kept_answers, 2, config, tmp_path) == [(1, 1, 2, 3, 4)] * 2


def with_kept_answers(config: Config, folder: Path) -> tuple[int, ...]:
    """Return how often it was tried out in all after each start; one cache folder a rank."""
    right, wrong = Found(sums=True, recovers=True, sec=1.0), Found(sums=True, recovers=False)
    with start_ranks(config) as ranks, pytest.MonkeyPatch.context() as patch:
        cache = folder / str(ranks.rank)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        gpus = dataclasses.replace(ranks, device=torch.device("cuda"), local_rank=0)
        asked = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, sync="auto")
        )
        trial = mock.Mock(return_value=right)
        patch.setattr(sync_form, "try_ddp", trial)
        patch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
        counts = []

        def start(name: str) -> None:
            assert choose_form(asked, gpus, {}).form.name == name
            ranks.barrier()
            counts.append(trial.call_count)

        start("ddp")
        start("ddp")  # kept
        if ranks.rank == 1:
            (cache / "dist_train" / sync_form.FILE).write_text("{torn")
        start("ddp")
        patch.setattr(torch.cuda, "get_device_name", lambda _: "another GPU")
        trial.return_value = wrong
        start("flat")
        start("flat")  # a failure is not kept
        return tuple(counts)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_killed_and_resumed_it_ends_with_the_bits_of_an_unbroken_run(
    world_size: int, tmp_path: Path
) -> None:
    """Begun with ddp; the commands that continue it leave the form open."""
    words = ("model.factory=tests.nets:noisy_net", "train.steps=12", "checkpoint.every_steps=2")
    whole = small(tmp_path / "whole", *words, "parallel.sync=ddp")
    clean = run_ranks(train, world_size, whole)[0]
    first = small(tmp_path / "run", *words, "parallel.sync=ddp")
    again = small(tmp_path / "run", *words)
    for number, (config, step) in enumerate([(first, 5), (again, 8), (again, 10)]):
        mark = tmp_path / f"fired_{number}"
        rank, place = number % world_size, "after the backward"
        fault = Fault(rank=rank, step=step, place=place, mark=str(mark))
        outcomes = start_ranks_of(train_with, world_size, config, fault)
        assert mark.exists()
        assert outcomes[rank].exit_code == -signal.SIGKILL
    ended = run_ranks(train, world_size, again)[0]
    assert (ended["sync"], ended["weights_sha256"]) == ("ddp", clean["weights_sha256"])
    told = (tmp_path / "run" / "log" / "rank0.txt").read_text()
    assert "resumed from" in told
    assert "what the command leaves open is as this run was begun: parallel.sync=ddp" in told
    assert "the bits of the result may differ" not in told


@pytest.mark.slow
def test_auto_goes_on_with_the_form_of_the_checkpoint(tmp_path: Path) -> None:
    """Begun with the form of GPUs, where the trial failed or not; continued by device."""
    words = (*SHORT, "checkpoint.every_steps=2", "parallel.sync=auto")
    longer = (*words, "train.steps=8")
    for name, form in (("swallows NaN", "flat"), ("", "ddp")):
        run = tmp_path / form
        assert run_ranks(trained, 2, small(run, *words), name)[0]["sync"] == form
        ended = run_ranks(train, 2, small(run, *longer))[0]
        assert ended["sync"] == form
        assert "the bits of the result may differ" not in (run / "log" / "rank0.txt").read_text()


def test_a_resume_whose_form_cannot_be_had_again_warns(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(train, 2, small(run, *SHORT, "parallel.sync=ddp"))
    longer = small(run, *SHORT, "train.steps=6", tried_out="again")
    ended = run_ranks(trained, 2, longer, "swallows NaN")
    assert ended[0]["sync"] == "ddp", "what the run was told counts as asked for"
    assert "parallel.sync=flat recovers" in (run / "log" / "rank0.txt").read_text()
    other = small(run, *SHORT, "train.steps=8", "parallel.sync=flat")
    run_ranks(train, 2, other)
    told = (run / "log" / "rank0.txt").read_text()
    assert "parallel.sync is flat and was ddp: the bits of the result may differ" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "step"),
    [(("tests.nets:unused_net",), 0), (("tests.nets:NowAndThen", "rank=1", "call=4"), 2)],
)
def test_a_parameter_without_gradient_ends_ddp_and_not_the_run(
    net: tuple[str, ...], step: int, tmp_path: Path
) -> None:
    words = (f"model.factory={net[0]}", *(f"model.args.{word}" for word in net[1:]))
    words = (*words, "train.steps=6", "log_every=1")
    config = small(tmp_path / "run", *words, "parallel.sync=auto")
    summaries = run_ranks(trained, 2, config, "")
    assert {s["sync"] for s in summaries} == {"flat"}
    told = (tmp_path / "run" / "log" / "rank0.txt").read_text()
    where = f"step {step} on rank {1 if step else 0}"
    assert f"{where}: the loss does not depend on the parameter" in told
    [weights] = {s["weights_sha256"] for s in summaries}
    assert [s["skipped_steps"] for s in summaries] == [0, 0]

    # With ddp asked for it is a mistake, and the cure is told.
    outcomes = start_ranks_of(train, 2, small(tmp_path / "ddp", *words, "parallel.sync=ddp"))
    for outcome in outcomes:
        assert "set parallel.sync=flat, or parallel.find_unused_parameters=true" in str(
            outcome.error
        )
    if step == 0:  # two ranks' sums have the same bits in any form
        plain = run_ranks(train, 2, small(tmp_path / "plain", *words, "parallel.sync=flat"))
        assert {s["weights_sha256"] for s in plain} == {weights}


def test_what_earlier_versions_called_a_form_is_read(tmp_path: Path) -> None:
    assert compose(["parallel.sync=overlap"]).config.parallel.sync == "ddp"
    file = tmp_path / "config.yaml"
    file.write_text("parallel:\n  sync: overlap\ntrain:\n  steps: 3\n")
    assert compose([], config_file=file).config.parallel.sync == "ddp"
    now = {"data": {}, CODE: {}, CONTENT: "", "parallel.sync": "ddp"}
    assert check_facts(now | {"parallel.sync": "overlap"}, now, "it") == []
    [told] = check_facts(now | {"parallel.sync": "flat"}, now, "it")
    assert "parallel.sync is ddp and was flat" in told


@pytest.mark.parametrize("saved", ["auto", "flat", "ddp"])
@pytest.mark.parametrize("asked", ["auto", "flat", "ddp"])
def test_what_a_command_leaves_open_is_as_the_run_was_begun(
    asked: str, saved: str, tmp_path: Path
) -> None:
    """flat is what every run of a version without auto says."""
    config, before = (compose([f"parallel.sync={sync}"]).config for sync in (asked, saved))
    kept = as_begun(config, before, tmp_path).parallel.sync
    assert kept == (saved if asked == "auto" else asked)


def test_ddp_that_is_given_up_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run_ranks(left_behind, 2, small(tmp_path)) == [(True, False, "flat")] * 2


def left_behind(config: Config) -> tuple[bool, bool, str]:
    """Say whether DDP lived, and whether it lives after it was given up."""
    with start_ranks(config) as ranks:
        net = plain_net(10).to(ranks.device)
        replica = Replica(net, ranks, config, Form(name="ddp"))
        assert replica.ddp is not None
        wrapper = weakref.ref(replica.ddp)
        images = torch.zeros(2, 3, 12, 12, device=ranks.device)
        replica.gradients.begin()
        with replica.gradients.piece(last=True):
            replica(images).sum().backward()
        replica.reduce()
        gc.collect()
        lived = wrapper() is not None
        replica.use_flat()
        gc.collect()
        found = (lived, wrapper() is not None, replica.form)
        replica.close()
    return found
