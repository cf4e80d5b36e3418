"""Training does not wait for a save, loses none that must exist, and hears of every failure."""

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dist_train import checkpoint, checkpoint_writer
from dist_train.checkpoint import PIECE_BYTES, HostBuffers, load_state
from dist_train.checkpoint_folder import (
    list_checkpoints,
    newest_good,
    read_manifest,
    read_verified,
)
from dist_train.checkpoint_upkeep import set_aside_after, tidy
from dist_train.checkpoint_writer import CheckpointWriter
from dist_train.config import CheckpointConfig
from dist_train.run_folder import RunFolder
from dist_train.saves import SaveFailedError, Saves
from tests.faults import train_with
from tests.ranks import run_ranks
from tests.settings import small
from tests.storage_faults import STATE, refusing_writes


class Told:
    """A writer, and what it said."""

    def __init__(self, folder: Path, keep_last: int = 5) -> None:
        self.saved: list[int] = []
        self.errors: list[str] = []
        self.recovered: list[str] = []
        self.writer = CheckpointWriter(
            folder,
            keep_last=keep_last,
            on_saved=self.saved.append,
            on_error=self.errors.append,
            on_recovered=self.recovered.append,
        )

    def save(self, step: int, *, must: bool) -> bool:
        return self.writer.save({**STATE, "n": step}, step=step, best_step=None, must=must)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    monkeypatch.setattr(checkpoint_writer, "FIRST_RETRY_SEC", 0.01)
    opened = Told(tmp_path / "run" / "checkpoints")
    yield opened
    opened.writer.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A slow disk: no save goes on before this is set."""
    opened, real = threading.Event(), checkpoint_writer.write_checkpoint

    def slow(*args: Any, **kwargs: Any) -> Path:
        assert opened.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    return opened


def wants_save(told: Told) -> bool:
    """Wait for what the thread does and for the pause between tries; then ask."""
    for _ in range(3000):
        if told.writer.wants_save:
            return True
        time.sleep(0.01)
    return False


def test_a_save_that_comes_too_soon_is_put_off_and_asked_for_later(
    told: Told, gate: threading.Event
) -> None:
    assert told.save(1, must=False)
    assert not told.save(2, must=False)
    assert not told.writer.wants_save, "the disk is as slow as before"
    gate.set()
    assert wants_save(told)
    assert told.save(3, must=False)
    assert told.writer.wait()
    assert told.saved == [1, 3]
    assert not told.writer.wants_save


def test_a_save_that_must_exist_waits_for_the_one_before(told: Told, gate: threading.Event) -> None:
    assert told.save(1, must=False)
    threading.Timer(0.2, gate.set).start()
    assert told.save(2, must=True)
    assert told.writer.wait()
    assert told.saved == [1, 2]


def test_a_failed_save_is_told_at_the_next_boundary_and_made_good_later(told: Told) -> None:
    told.save(1, must=True)
    told.writer.wait()
    with refusing_writes(told.writer.folder, 28) as count:
        assert told.save(2, must=False)
        assert wants_save(told)
        assert count.injected
        [line] = told.errors
        assert "checkpoint of step 2 not saved" in line
        assert "No space left on device" in line
        assert "the one of step 1 is kept, training goes on" in line
        assert told.save(3, must=False)  # the disk is still full: nothing new to tell
        assert wants_save(told)
        assert len(told.errors) == 1
    assert told.save(4, must=False)
    assert told.writer.wait()
    assert told.saved == [1, 4]
    assert "of step 4, after 2 failed tries" in told.recovered[0]
    assert [p.name for p in told.writer.folder.iterdir() if p.name.startswith(".")] == []


def test_the_best_is_tried_again_with_its_own_state(told: Told) -> None:
    with refusing_writes(told.writer.folder, 5):
        assert told.save(7, must=True)
        while not told.errors:
            told.writer.poll()
        assert not told.save(8, must=False), "the best's copy is not overwritten"
    for _ in range(1000):
        told.writer.poll()
        if told.saved:
            break
        time.sleep(0.01)
    assert told.saved == [7]
    assert load_state(read_verified(told.writer.folder / "step_00000007"))["n"] == 7


def test_a_vanished_folder_is_made_again_but_not_that_of_the_run(told: Told) -> None:
    run = told.writer.folder.parent
    shutil.rmtree(told.writer.folder)
    assert told.save(1, must=True)
    assert told.writer.wait()
    shutil.rmtree(run)
    assert told.save(2, must=True)
    assert not told.writer.wait()
    assert not run.exists(), "a disk that comes back would be hidden under it"
    assert "No such file" in told.errors[0]
    run.mkdir()
    assert told.writer.wait()
    assert [p.name for p in list_checkpoints(told.writer.folder)] == ["step_00000002"]


def test_a_file_in_place_of_the_folder_keeps_training(told: Told) -> None:
    shutil.rmtree(told.writer.folder)
    told.writer.folder.write_text("not yours")
    assert told.save(1, must=True)
    assert not told.writer.wait()
    assert told.errors
    told.writer.folder.unlink()
    assert told.writer.wait(retry_sec=5)
    assert told.saved == [1]


def test_no_memory_for_a_save_is_no_end_of_training(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_checkpoint", mock.Mock(side_effect=MemoryError))
        assert told.save(1, must=False)
        assert wants_save(told)
    assert "MemoryError" in told.errors[0]
    assert told.save(2, must=True)
    assert told.writer.wait()


def test_a_state_that_could_never_be_read_again_is_refused_at_once(told: Told) -> None:
    bad = {"facts": {"x": [1, np.zeros(3)]}}
    with pytest.raises(TypeError, match=r"state\['facts'\]\['x'\]\[1\] is a ndarray"):
        told.writer.save(bad, step=1, best_step=None)
    with pytest.raises(TypeError, match="has a key"):
        told.writer.save({"a": {(1, 2): 3}}, step=1, best_step=None)


def test_numbers_of_numpy_are_saved_as_those_of_python() -> None:
    numbers = {"f": np.float64(0.1), "i": np.int16(-3), "b": np.bool_(True), "s": np.str_("x")}
    found = HostBuffers().copy(numbers)
    assert found == {"f": 0.1, "i": -3, "b": True, "s": "x"}
    assert [type(value) for value in found.values()] == [float, int, bool, str]


def test_host_buffers_hold_what_was_copied_last_and_are_used_again() -> None:
    buffers = HostBuffers()
    state = {
        "wide": torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        "turned": torch.randn(7, 9).t(),
        "every other": torch.randn(10, 10)[::2, ::3],
        "scalar": torch.tensor(3),
        "flags": torch.ones(3, dtype=torch.bool),
        "half": torch.randn(5).bfloat16(),
        "none": torch.empty(0),
        "list": [torch.ones(2)],
        "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
        "negative": torch.randn(1, dtype=torch.complex64).conj().imag,
        "a part": torch.randn(10, 10)[3:5],
    }
    assert state["conjugate"].is_conj()
    assert state["negative"].is_neg()
    assert state["negative"].is_contiguous()
    first = buffers.copy(state)
    where = first["wide"].data_ptr()
    for value in (first["wide"], first["turned"], first["a part"]):
        value.zero_()
    again = buffers.copy(state)
    assert again["wide"].data_ptr() == where
    for name in state.keys() - {"list"}:
        assert torch.equal(again[name], state[name]), name
        assert again[name].data_ptr() != state[name].data_ptr() or name == "none"
    state["flags"][0] = False
    assert again["flags"].all()


def test_what_a_kill_left_is_cleared_and_what_it_replaced_comes_back(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.save(5, must=True)
    told.writer.close()
    (tmp_path / "step_00000005").rename(tmp_path / ".replaced-step_00000005-123")
    for name in (".writing-step_00000005-123", ".deleting-step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"x")
    tidy(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]
    assert newest_good(tmp_path, print) is not None


def test_checkpoints_set_aside_count_no_more_and_only_the_newest_stays(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in (5, 10, 15, 20):
        told.save(step, must=True)
    told.writer.close()
    assert [p.name for p in set_aside_after(tmp_path, 10)] == [".rejected-step_00000020"]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000010", "step_00000005"]
    found = newest_good(tmp_path, print)
    assert found is not None
    assert found[0].name == "step_00000010"
    assert set_aside_after(tmp_path, 10) == []
    tidy(tmp_path)
    assert (tmp_path / ".rejected-step_00000020").exists()


class Rank0:
    """What a run's folder wants to know of the ranks."""

    rank, world_size, attempt, chain, launcher = 0, 1, 0, "c", "single"


def saves(folder: Path, **changes: Any) -> tuple[Saves, list[str]]:
    lines: list[str] = []
    run_folder = RunFolder(folder, Rank0())  # pyright: ignore[reportArgumentType] # enough of it
    made = Saves(
        CheckpointConfig(**changes),
        run_folder,
        num_ranks=1,
        earlier=(0, 0.0),
        say=lines.append,
        warn=lines.append,
    )
    return made, lines


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_save_put_off_is_an_event_each_time_and_one_warning(
    tmp_path: Path, gate: threading.Event
) -> None:
    made, lines = saves(tmp_path)
    for step in (1, 2, 3):
        made.save(STATE, step=step, best_step=None, must=False)
    gate.set()
    made.close()
    [line] = lines
    assert "the save of step 2 is put off" in line
    assert [e["step"] for e in events(tmp_path) if e["event"] == "save_put_off"] == [2, 3]


def test_a_disk_that_does_not_answer_is_told_of_while_training_goes_on(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.saves.SLOW_SAVE_SEC", 0.05)
    made, lines = saves(tmp_path)
    gate.set()
    made.save(STATE, step=4, best_step=None, must=True)
    made.wait()
    gate.clear()
    made.save(STATE, step=6, best_step=None, must=False)
    end = time.monotonic() + 30
    while not lines and time.monotonic() < end:
        made.wanted(9)
    made.wanted(10)
    [line] = lines
    assert f"on its way to {tmp_path / 'checkpoints'} for " in line
    assert "the newest one is of step 4, 5 steps ago; training goes on" in line
    assert [e["step"] for e in events(tmp_path) if e["event"] == "save_slow"] == [9]
    gate.set()
    made.close()
    took = {e["step"]: e["sec"] for e in events(tmp_path) if e["event"] == "saved"}
    assert took.keys() == {4, 6}
    assert took[6] > 0.0


def test_a_last_save_that_fails_is_an_error_that_says_what_is_lost(tmp_path: Path) -> None:
    made, lines = saves(tmp_path)
    made.save(STATE, step=4, best_step=None, must=True)
    made.finish(4, "the run is over", retry_sec=0)
    with refusing_writes(tmp_path / "checkpoints", 28):
        made.save(STATE, step=9, best_step=None, must=True)
        with pytest.raises(SaveFailedError) as raised:
            made.finish(9, "the run was asked to stop", retry_sec=0)
    text = str(raised.value)
    assert text.startswith("the run was asked to stop at step 9, and its last checkpoint could not")
    assert "No space left on device" in text
    assert "the newest one is of step 4, 5 steps earlier" in text
    assert "give the same command again" in text
    made.close()
    assert "saved again" in lines[-1]


def train_on_slow_disk(config: Any) -> dict[str, Any]:
    """Call train(config) with saves that take as long as several periods."""
    from dist_train import train as loop

    real = checkpoint_writer.write_checkpoint

    def slow(*args: Any, **kwargs: Any) -> Path:
        time.sleep(0.3)
        return real(*args, **kwargs)

    with mock.patch.object(checkpoint_writer, "write_checkpoint", slow):
        return loop.train(config)


@pytest.mark.slow
def test_a_slow_disk_puts_saves_off_and_changes_no_bit(tmp_path: Path) -> None:
    options = ("train.steps=40", "log_every=1", "optim.ema_decay=0.9")
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *options), None)[0]
    run = tmp_path / "run"
    often = ("checkpoint.every_steps=1", "checkpoint.exact_steps=false")
    slow = run_ranks(train_on_slow_disk, 2, small(run, *options, *often))[0]
    assert slow["weights_sha256"] == clean["weights_sha256"]
    kinds = [e["event"] for e in events(run)]
    assert kinds.count("save_put_off") > 5
    assert (run / "log" / "rank0.txt").read_text().count("is put off") == 1
    assert list_checkpoints(run / "checkpoints")[0].name == "step_00000040"


def rolled_back(config: Any) -> list[Any]:
    """Train, then set the newest checkpoints aside and resume in the same process, on any rank."""
    from dist_train import train as loop
    from dist_train.run import Run

    seen: list[Any] = []
    real, real_save = loop.end_finished, Saves.save

    def save_all(saves: Saves, state: dict[str, Any], **options: Any) -> None:
        real_save(saves, state, **(options | {"must": True}))  # none is put off

    def end(run: Run, parts: Any, progress: Any, data: Any, result: Any) -> dict[str, Any]:
        from dist_train.metrics import Meter

        run.states.set_aside_after(6, why="rejected")
        again = run.resume(parts, Meter(run.ranks, parts.plan), data)
        seen.append((again.step, again.generation))
        return real(run, parts, again, data, result)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "end_finished", end))
        stack.enter_context(mock.patch.object(Saves, "save", save_all))
        loop.train(config)
    return seen


@pytest.mark.slow
def test_a_run_may_resume_a_second_time_in_one_process(tmp_path: Path) -> None:
    options = ("train.steps=12", "checkpoint.every_steps=3", "checkpoint.keep_last=9")
    seen = run_ranks(rolled_back, 2, small(tmp_path, *options))
    assert seen == [[(6, 0)], [(6, 0)]]
    [aside] = [e for e in events(tmp_path) if e["event"] == "checkpoints_set_aside"]
    assert aside["steps"] == [12, 9]
    assert [e["event"] for e in events(tmp_path)].count("earlier_attempt_died") == 0


def test_a_read_only_folder_keeps_training_where_permissions_count(told: Told) -> None:
    folder = told.writer.folder
    with mock.patch.object(os, "mkdir", side_effect=OSError(30, "Read-only file system")):
        assert told.save(1, must=True)
        assert not told.writer.wait()
    assert "Read-only file system" in told.errors[0]
    assert told.writer.wait()
    assert told.saved == [1]
    assert not folder.stat().st_mode & stat.S_IWOTH


@pytest.mark.parametrize("numbers", [1, PIECE_BYTES // 4, PIECE_BYTES // 2 + 3])
def test_a_manifest_says_what_was_written_in_pieces(tmp_path: Path, numbers: int) -> None:
    state = {"w": torch.randn(numbers), "flags": [torch.ones(5, dtype=torch.bool)]}
    path = checkpoint.write_checkpoint(tmp_path, state, step=1)
    data = (path / "state.pt").read_bytes()
    manifest = read_manifest(path)
    assert manifest.state_sha256 == hashlib.sha256(data).hexdigest()
    assert read_verified(path) == data
    assert torch.equal(load_state(data)["w"], state["w"])


def test_a_disk_that_refuses_the_middle_of_a_state_is_told_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    state = {"w": torch.randn(PIECE_BYTES)}
    with refusing_writes(tmp_path, errno.EIO) as refused, pytest.raises(OSError, match="output"):
        checkpoint.write_checkpoint(tmp_path, state, step=1)
    assert refused.injected == 2  # a short write and an error: no more was tried
    assert not list(tmp_path.iterdir())


def test_a_state_is_never_whole_in_memory(tmp_path: Path) -> None:
    sizes: list[int] = []
    write = os.write

    def noted(descriptor: int, data: Any) -> int:
        sizes.append(len(data))
        return write(descriptor, data)

    state = {"large": torch.randn(PIECE_BYTES), "small": [torch.randn(9) for _ in range(99)]}
    with mock.patch.object(os, "write", noted):
        path = checkpoint.write_checkpoint(tmp_path, state, step=1)
    assert sum(sizes) == sum(file.stat().st_size for file in path.iterdir())
    assert max(sizes) < 2 * PIECE_BYTES
    assert len(sizes) < 10, "what is small is written together"


def test_what_goes_wrong_inside_torch_s_writer_is_told_as_it_was(tmp_path: Path) -> None:
    write = mock.Mock(side_effect=MemoryError("no memory for a piece"))
    with (
        mock.patch.object(os, "write", write),
        pytest.raises(MemoryError, match="no memory for a piece"),
    ):
        checkpoint.write_checkpoint(tmp_path, {"w": torch.randn(PIECE_BYTES)}, step=1)
    assert not list(tmp_path.iterdir())
