"""What a disk, a power cut or another hand does to a checkpoint is noticed, and nothing runs."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from dist_train.checkpoint import write_checkpoint
from dist_train.checkpoint_folder import BadCheckpointError, newest_good, read_verified
from dist_train.config import ConfigError
from tests.faults import train_with
from tests.power_cuts import cut_power
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small
from tests.spoilt_checkpoints import SPOILS, Evil, crafted_files, crafted_states, seal_state
from tests.storage_faults import (
    STATE,
    SmallDisk,
    cut_files,
    flip_bits,
    refusing_writes,
    train_killed_in_save,
    train_on_disk,
    train_with_a_wild_clock,
)


def test_every_flipped_bit_is_refused_and_the_older_one_is_used(tmp_path: Path) -> None:
    count = flip_bits(tmp_path, 200, seed=0)
    assert (count.injected, count.missed) == (200, [])


def test_every_truncation_is_refused_and_the_older_one_is_used(tmp_path: Path) -> None:
    count = cut_files(tmp_path, 40, seed=0)
    assert (count.injected, count.missed) == (40, [])


@pytest.mark.parametrize("how", SPOILS)
def test_a_spoilt_one_is_told_in_a_line_and_the_one_before_it_is_taken(
    how: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    older = write_checkpoint(folder, STATE, step=9)
    newer = write_checkpoint(folder, {**STATE, "n": 4}, step=10)
    os.utime(newer, (0, 0))  # the order is that of the steps, whatever the clocks say
    wanted = SPOILS[how](newer, older)
    told: list[str] = []
    found = newest_good(folder, told.append)
    assert found == (older, read_verified(older))
    [line] = told
    assert wanted in line
    assert str(newer) in line
    assert "\n" not in line
    assert not (tmp_path / "owned").exists()
    shutil.rmtree(older)
    with pytest.raises(BadCheckpointError, match="none of the 1 checkpoints"):
        newest_good(folder, told.append)


def test_the_order_is_that_of_the_steps_not_of_the_clock(tmp_path: Path) -> None:
    for step, when in ((3, 3e9), (20, 1e9), (100, 0)):
        os.utime(write_checkpoint(tmp_path, STATE, step=step), (when, when))
    found = newest_good(tmp_path, print)
    assert found is not None
    assert found[0].name == "step_00000100"


def test_crafted_states_are_refused_run_nothing_and_take_no_memory(tmp_path: Path) -> None:
    count = crafted_files(tmp_path)
    assert count.missed == []
    assert count.injected >= 15


def test_the_crafted_command_would_have_left_its_mark(tmp_path: Path) -> None:
    Evil(tmp_path / "owned").__reduce__()[0](f"touch {tmp_path / 'owned'}")
    assert (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a zip with os.system", "in the optimizer's state", "a zip bomb"])
def test_a_run_refuses_a_crafted_state_with_right_checksums(kind: str, tmp_path: Path) -> None:
    run_ranks(train_with, 0, small(tmp_path / "run", "train.steps=9"), None)
    path = tmp_path / "run" / "checkpoints" / "step_00000009"
    seal_state(path, crafted_states(tmp_path / "owned")[kind])
    read_verified(path)
    outcome = start_ranks_of(train_with, 0, small(tmp_path / "run", "train.steps=18"), None)[0]
    assert isinstance(outcome.error, ConfigError)
    assert "more than tensors and plain values" in str(outcome.error)
    assert not (tmp_path / "owned").exists()


def test_a_link_instead_of_the_checkpoints_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STATE, step=9)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(BadCheckpointError, match="symbolic link"):
        newest_good(run / "checkpoints", print)
    with pytest.raises(BadCheckpointError, match="symbolic link"):
        read_verified(run / "checkpoints" / "step_00000009")
    outcome = start_ranks_of(train_with, 0, small(run, "train.steps=9"), None)[0]
    assert isinstance(outcome.error, ConfigError)
    assert "symbolic link" in str(outcome.error)
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000009"]


@pytest.mark.parametrize(("mode", "who"), [(0o775, "its group"), (0o777, "everybody")])
@pytest.mark.parametrize("part", ["", "state.pt", "manifest.json", ".."])
def test_a_checkpoint_that_others_may_change_is_loaded_with_a_warning(
    mode: int, who: str, part: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, STATE, step=9)
    told: list[str] = []
    newest_good(tmp_path, told.append)
    assert told == []
    os.chmod(path / part, mode)
    newest_good(tmp_path, told.append)
    [line] = told
    assert f"can be changed by {who}" in line
    assert "chmod -R go-w" in line


def test_a_checkpoint_of_another_owner_is_loaded_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = Path.lstat

    def anothers(self: Path) -> os.stat_result:
        """Return what a file has; state.pt as if it were user 12345's."""
        found = list(lstat(self))
        if self.name == "state.pt":
            found[stat.ST_UID] = 12345
        return os.stat_result(found)

    write_checkpoint(tmp_path, STATE, step=9)
    monkeypatch.setattr(Path, "lstat", anothers)
    told: list[str] = []
    assert newest_good(tmp_path, told.append) is not None
    assert "belongs to user 12345" in told[0]


def test_what_is_written_is_nobody_elses_to_change_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = write_checkpoint(tmp_path, STATE, step=9)
    finally:
        os.umask(before)
    for part in (path, *path.iterdir()):
        assert not part.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), part


def test_the_last_announced_one_survives_a_power_cut_anywhere(tmp_path: Path) -> None:
    count = cut_power(tmp_path, 150, seed=0)
    assert (count.injected, count.missed) == (150, [])


@pytest.mark.slow
@pytest.mark.parametrize("skipped", ["file", "folder", "parent"])
def test_the_model_of_power_cuts_notices_a_sync_that_is_missing(
    skipped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train import checkpoint, checkpoint_upkeep

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        kind = "file" if name.is_file() else "parent" if name.name == "checkpoints" else "folder"
        if kind != skipped:
            os.fsync(descriptor)

    class Skipping:
        """os, without one kind of sync."""

        def __getattr__(self, name: str) -> object:
            return fsync if name == "fsync" else getattr(os, name)

    monkeypatch.setattr(checkpoint, "os", Skipping())
    monkeypatch.setattr(checkpoint_upkeep, "os", Skipping())
    assert cut_power(tmp_path, 400, seed=1).missed


FULL_DISK = ("optim.schedule=constant", "checkpoint.every_steps=2", "log_every=1")


@pytest.mark.slow
def test_a_disk_full_at_night_costs_nothing_but_saves(tmp_path: Path) -> None:
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *FULL_DISK, "train.steps=30"), None)
    with SmallDisk(tmp_path / "disk", 20) as disk:
        run = disk.path / "run"
        config = small(run, *FULL_DISK, "train.steps=30")
        summary = run_ranks(train_on_disk, 2, config, disk.path, 6, 20)[0]
        assert summary["weights_sha256"] == clean[0]["weights_sha256"]
        events = [json.loads(x) for x in (run / "events.jsonl").read_text().splitlines()]
        kinds = [e["event"] for e in events]
        assert "save_failed" in kinds
        assert "save_recovered" in kinds
        assert kinds.index("save_failed") < kinds.index("save_recovered")
        [reason] = [e["reason"] for e in events if e["event"] == "save_failed"]
        assert "No space left on device" in reason
        assert "training goes on" in reason
        steps = [m["step"] for m in metrics(run) if "train/loss" in m]
        assert steps == list(range(1, 31)), "lines of the time without space are there"
        assert [p.name for p in (run / "checkpoints").glob(".*")] == [], "litter"
        found = newest_good(run / "checkpoints", print)
        assert found is not None
        assert found[0].name == "step_00000030"
        told = (run / "log" / "rank0.txt").read_text()
        assert "not saved" in told
        assert "saved again" in told


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_with_a_message_and_the_same_command_mends_it(
    tmp_path: Path,
) -> None:
    with SmallDisk(tmp_path / "disk", 20) as disk:
        run = disk.path / "run"
        config = small(run, *FULL_DISK, "train.steps=30")
        outcome = start_ranks_of(train_on_disk, 2, config, disk.path, 20, None)[0]
        assert type(outcome.error).__name__ == "SaveFailedError"
        assert "at step 30, and its last checkpoint could not be saved" in str(outcome.error)
        assert "No space left on device" in str(outcome.error)
        assert "the newest one is of step 20, 10 steps earlier" in str(outcome.error)
        assert "give the same command again" in str(outcome.error)
        found = newest_good(run / "checkpoints", print)
        assert found is not None
        assert found[0].name == "step_00000020"
        disk.empty()
        again = run_ranks(train_with, 2, config, None)[0]
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *FULL_DISK, "train.steps=30"), None)
    assert again["weights_sha256"] == clean[0]["weights_sha256"]


@pytest.mark.slow
def test_a_stop_that_cannot_be_saved_is_no_success_and_says_what_is_lost(tmp_path: Path) -> None:
    with SmallDisk(tmp_path / "disk", 20) as disk:
        config = small(disk.path / "run", *FULL_DISK, "train.steps=1000000")
        outcome = start_ranks_of(train_on_disk, 2, config, disk.path, 20, None, 25)[0]
        assert type(outcome.error).__name__ == "SaveFailedError"
        assert "the run was asked to stop (SIGTERM on rank 0) at step 2" in str(outcome.error)
        assert "the newest one is of step 20" in str(outcome.error)
        found = newest_good(disk.path / "run" / "checkpoints", print)
        assert found is not None
        assert found[0].name == "step_00000020"


@pytest.mark.slow
def test_a_clock_that_jumps_by_a_day_changes_nothing(tmp_path: Path) -> None:
    options = ("train.steps=20", "checkpoint.every_steps=5", "checkpoint.keep_last=9")
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *options), None)[0]
    wild = run_ranks(train_with_a_wild_clock, 2, small(tmp_path / "wild", *options), 0)[0]
    assert wild["weights_sha256"] == clean["weights_sha256"]
    assert 0 < wild["wall_sec"] < 600
    assert wild["train_images_per_sec"] > 0
    times = [m["time"] for m in metrics(tmp_path / "wild")]
    assert times != sorted(times), "the clock jumped"
    found = newest_good(tmp_path / "wild" / "checkpoints", print)
    assert found is not None
    assert found[0].name == "step_00000020"


@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.ENOSPC])
def test_an_error_in_the_middle_of_a_write_leaves_no_litter(code: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STATE, step=1)
    with (
        refusing_writes(tmp_path, code) as count,
        pytest.raises(OSError, match=os.strerror(code)[:10]),
    ):
        write_checkpoint(tmp_path, STATE, step=2)
    assert count.injected == 2, "a short write, then an error"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.1, 0.5, 0.9, 1.0])
def test_a_kill_inside_a_save_leaves_nothing_partial_and_the_run_ends_the_same(
    offset: float, tmp_path: Path
) -> None:
    options = ("checkpoint.every_steps=4", "train.steps=20")
    clean = run_ranks(train_with, 2, small(tmp_path / "clean", *options), None)[0]
    mark, config = tmp_path / "fired", small(tmp_path / "run", *options)
    start_ranks_of(train_killed_in_save, 2, config, 3, offset, str(mark))
    assert mark.exists(), "the kill never came"
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.glob("step_*"):
        read_verified(path)
    again = run_ranks(train_with, 2, config, None)[0]
    assert again["weights_sha256"] == clean["weights_sha256"]
    assert list(folder.glob(".*")) == []
