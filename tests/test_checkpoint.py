"""A checkpoint is whole and unchanged, or it is refused and the one before it is taken."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dist_train.checkpoint import load_state, weights_sha256, write_checkpoint
from dist_train.checkpoint_folder import (
    BadCheckpointError,
    list_checkpoints,
    newest_good,
    newest_step,
    read_verified,
    step_of,
)
from dist_train.checkpoint_upkeep import Aside, prune, set_aside_after
from dist_train.checkpoint_writer import CheckpointWriter
from dist_train.config import Config, ConfigError
from tests.faults import train_with
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import small

STATE: dict[str, Any] = {"w": torch.arange(100.0), "n": 3, "nested": {"l": [1, "a", None]}}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, STATE, step=12)
    assert path.name == "step_00000012"
    state = load_state(read_verified(path))
    assert torch.equal(state.pop("w"), STATE["w"])
    assert state == {"n": 3, "nested": {"l": [1, "a", None]}}
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000012"]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, STATE, step=1)
    good = {f.name: f.read_bytes() for f in path.iterdir()}
    dice = random.Random(0)
    for _ in range(300):
        name = dice.choice(["state.pt", "state.pt", "manifest.json"])
        data = bytearray(good[name])
        place = dice.randrange(len(data))
        data[place] ^= 1 << dice.randrange(8)
        (path / name).write_bytes(data)
        with pytest.raises(BadCheckpointError):
            read_verified(path)
        (path / name).write_bytes(good[name])
    read_verified(path)


def damaged(path: Path, how: str) -> None:
    state, manifest = path / "state.pt", path / "manifest.json"
    record = json.loads(manifest.read_text())
    if how == "truncated":
        os.truncate(state, state.stat().st_size // 2)
    elif how == "empty":
        os.truncate(state, 0)
    elif how == "without manifest":
        manifest.unlink()
    elif how == "without state":
        state.unlink()
    elif how == "torn manifest":
        os.truncate(manifest, 20)
    elif how == "future version":
        manifest.write_text(json.dumps(record | {"format_version": 99}))
    elif how == "renamed":
        manifest.write_text(json.dumps(record | {"step": 5}))
    elif how == "symbolic link":
        state.rename(path.parent / "elsewhere")
        state.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "without manifest",
        "without state",
        "torn manifest",
        "future version",
        "renamed",
        "symbolic link",
    ],
)
def test_a_damaged_one_is_reported_and_the_one_before_it_is_taken(how: str, tmp_path: Path) -> None:
    older = write_checkpoint(tmp_path, STATE, step=9)
    newer = write_checkpoint(tmp_path, STATE, step=10)
    damaged(newer, how)
    told: list[str] = []
    found = newest_good(tmp_path, told.append)
    assert found is not None
    assert found[0] == older
    assert len(told) == 1
    assert str(newer) in told[0]
    damaged(older, "truncated")
    with pytest.raises(BadCheckpointError, match="none of the 2 checkpoints"):
        newest_good(tmp_path, told.append)


def test_the_newest_step_is_of_a_checkpoint_that_seems_whole(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "nowhere") == 0
    for step in (9, 10, 11):
        write_checkpoint(tmp_path, STATE, step=step)
    assert newest_step(tmp_path) == 11
    damaged(tmp_path / "step_00000011", "truncated")
    assert newest_step(tmp_path) == 10
    (tmp_path / "step_00000010" / "manifest.json").unlink()
    assert newest_step(tmp_path) == 9
    os.truncate(tmp_path / "step_00000009" / "manifest.json", 9)
    assert newest_step(tmp_path) == 0


def test_a_preferred_one_is_found_behind_newer_ones_or_else_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path, {**STATE, "n": step}, step=step)
    damaged(tmp_path / "step_00000010", "truncated")
    for wanted, found in ((9, 9), (10, 11), (7, 11)):
        good = newest_good(
            tmp_path, print, prefer=lambda data, n=wanted: load_state(data)["n"] == n
        )
        assert good is not None
        assert step_of(good[0]) == found


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "nowhere", lambda text: None) is None


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_loading_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    path = write_checkpoint(tmp_path, {"x": Evil(mark)}, step=1)
    for data in (read_verified(path), pickle.dumps(Evil(mark))):
        with pytest.raises(BadCheckpointError):
            load_state(data)
    assert not mark.exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, STATE, step=step)
    prune(tmp_path, keep_last=2, newest=12, keep_step=3)
    assert [p.name[-2:] for p in list_checkpoints(tmp_path)] == ["12", "09", "03"]


def test_what_was_just_saved_stays_beside_newer_ones_that_are_bad(tmp_path: Path) -> None:
    for step in (100, 200, 250, 300, 400):
        write_checkpoint(tmp_path, STATE, step=step)
    prune(tmp_path, keep_last=2, newest=250, keep_step=None)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [400, 300, 250, 200]


@pytest.mark.parametrize("why", ["rejected", "refused"])
def test_a_link_in_place_of_a_checkpoint_can_be_set_aside_again_and_again(
    why: Aside, tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    folder = tmp_path / "checkpoints"
    write_checkpoint(tmp_path, STATE, step=9).rename(folder)
    for _ in range(2):
        (folder / "step_00000010").symlink_to(tmp_path / "target")
        (folder / "step_00000011").symlink_to(tmp_path / "nowhere")
        set_aside_after(folder, 9, why=why)
    left = {p.name for p in folder.glob(".re*")}
    refused = {".refused-step_00000010", ".refused-step_00000011"}
    assert left == (refused if why == "refused" else {".rejected-step_00000011"})
    assert (tmp_path / "target").exists()


def test_a_failed_save_leaves_nothing_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train import checkpoint

    errors: list[str] = []
    writer = CheckpointWriter(
        tmp_path, keep_last=1, on_saved=lambda step: None, on_error=errors.append
    )
    writer.save(STATE, step=1, best_step=None)
    assert writer.wait()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(checkpoint, "_write_file", full)
    writer.save(STATE, step=2, best_step=None)
    assert not writer.wait()
    assert "No space left" in errors[0]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    writer.save(STATE, step=3, best_step=None)
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_the_state_is_copied_before_save_returns(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1_000_000)}
    writer = CheckpointWriter(tmp_path, keep_last=1, on_saved=lambda step: None, on_error=print)
    writer.save(state, step=1, best_step=None)
    state["w"] += 1
    writer.close()
    assert load_state(read_verified(tmp_path / "step_00000001"))["w"].sum() == 0


def test_the_digest_of_weights_knows_names_bytes_and_order() -> None:
    a, b = torch.ones(3), torch.zeros(2)
    base = weights_sha256({"a": a, "b": b})
    assert base == weights_sha256({"a": a.clone(), "b": b.clone()})
    assert base != weights_sha256({"b": b, "a": a})
    assert base != weights_sha256({"a": a, "c": b})
    assert base != weights_sha256({"a": a, "b": torch.nextafter(b, torch.ones(2))})
    wide = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert weights_sha256({"w": wide}) == weights_sha256(
        {"w": wide.contiguous(memory_format=torch.channels_last)}
    )


def trained(config: Config) -> dict[str, Any]:
    from dist_train.train import train

    return train(config)


@pytest.mark.slow
def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    options = ("checkpoint.every_steps=5", "optim.schedule=constant")
    clean = run_ranks(trained, 2, small(tmp_path / "a", *options, "train.steps=20"))[0]
    run_ranks(trained, 2, small(tmp_path / "b", *options, "train.steps=10"))
    damaged(tmp_path / "b" / "checkpoints" / "step_00000010", "truncated")
    resumed = run_ranks(trained, 2, small(tmp_path / "b", *options, "train.steps=20"))[0]
    assert resumed["weights_sha256"] == clean["weights_sha256"]
    told = (tmp_path / "b" / "log" / "rank0.txt").read_text()
    assert "checkpoint refused" in told
    assert "resumed from" in told


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_bad_does_not_start_over(tmp_path: Path) -> None:
    run_ranks(trained, 0, small(tmp_path, "train.steps=9"))
    for path in list_checkpoints(tmp_path / "checkpoints"):
        damaged(path, "truncated")
    outcome = start_ranks_of(train_with, 0, small(tmp_path, "train.steps=18"), None)[0]
    assert isinstance(outcome.error, ConfigError)
    assert "is good" in str(outcome.error)


@pytest.mark.slow
def test_other_data_under_the_same_settings_are_refused(tmp_path: Path) -> None:
    run_ranks(trained, 0, small(tmp_path, "train.steps=9"))
    options = ("train.steps=18", "data.args.num_test=80", "resume_allow=[data.args]")
    outcome = start_ranks_of(train_with, 0, small(tmp_path, *options), None)[0]
    assert isinstance(outcome.error, ConfigError)
    assert "num_test 80 instead of 70" in str(outcome.error)
