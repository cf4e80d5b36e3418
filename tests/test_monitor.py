"""Who hangs and who is slow, decided from made-up heartbeats; no process hangs here."""

import dataclasses
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.distributed import single_process
from dist_train.heartbeat import (
    HERE,
    NUMBER_OF,
    PHASES,
    SLOT_BYTES,
    Beat,
    Identity,
    Phase,
    Pulse,
    read_beat,
)
from dist_train.monitor import processes
from dist_train.monitor.ending import within
from dist_train.monitor.limits import Limits
from dist_train.monitor.link import Link, hub_socket, socket_to
from dist_train.monitor.processes import descendants, kill, read_stat, state_of
from dist_train.monitor.report import Place, append_event, record_failure
from dist_train.monitor.stragglers import Stragglers
from dist_train.monitor.verdict import LEFT, Verdict, View, decide
from dist_train.run_folder import RunFolder

HANG = 5.0


def view(
    rank: int,
    phase: Phase,
    step: int,
    silence: float,
    *,
    waits: bool = False,
    state: str = "S",
    limit: float = HANG,
    gone_sec: float = 0.0,
    **more: int,
) -> View:
    place = (rank, "host", NUMBER_OF[phase], step)
    return View(*place, waits, silence, limit, state, gone_sec=gone_sec, **more)


def blamed(*views: View, lost: tuple[str, ...] = ()) -> tuple[int, ...] | None:
    """Return the culprits; None if nobody hangs."""
    verdict = decide(views, hang_sec=HANG, lost=lost)
    return None if verdict is None else verdict.culprits


def test_a_rank_that_waits_is_a_victim() -> None:
    waiting = view(0, "all-reduce", 7, 9.0, waits=True)
    assert blamed(waiting, view(1, "forward", 7, 5.1)) == (1,)
    assert blamed(waiting, view(1, "forward", 7, 4.9)) is None
    assert blamed(waiting, view(1, "all-reduce", 7, 5.1)) == (1,), "not inside the collective"


def test_a_stopped_process_is_the_culprit_wherever_it_is() -> None:
    stopped = view(1, "all-reduce", 7, 5.1, waits=True, state="T", limit=100.0)
    assert blamed(view(0, "backward", 7, 6.0), stopped) == (1,)
    assert blamed(view(0, "evaluation", 7, 1.0), stopped._replace(silence=4.0)) is None


def test_the_rank_furthest_behind_is_blamed_first() -> None:
    # With DDP the victims wait inside their backward, where nothing says so.
    victim = view(0, "backward", 7, 6.0)
    assert blamed(victim, view(1, "forward", 7, 5.5)) == (1, 0)
    assert blamed(victim, view(1, "backward", 6, 5.5)) == (1, 0)


def test_nobody_is_blamed_while_a_rank_behind_has_time_left() -> None:
    victim = view(1, "backward", 7, 30.0)
    assert blamed(victim, view(0, "checkpoint", 7, 30.0, limit=60.0)) is None
    assert blamed(victim, view(0, "checkpoint", 7, 61.0, limit=60.0)) == (0, 1)
    assert blamed(victim, view(0, "data", 8, 30.0, limit=60.0)) == (1,), "that one is ahead"


def test_when_all_wait_the_calls_are_told_and_nobody_is_blamed() -> None:
    first = view(0, "evaluation", 9, 8.1, waits=True, calls=5, call=2, values=1)
    second = view(1, "logging", 9, 8.1, waits=True, calls=5, call=1, values=8)
    verdict = decide([first, second], hang_sec=HANG)
    assert verdict is not None
    assert verdict.culprits == ()
    assert "they call different ones" in verdict.text
    assert "rank 0: waits for other ranks in evaluation at step 9" in verdict.text
    assert "control_sum of 1 values" in verdict.text
    assert "all_reduce of 8 values" in verdict.text
    assert blamed(first, second._replace(silence=7.9)) is None, "TCP needs 6.2 s after a cut of 3"
    again = decide([first, first._replace(rank=1)], hang_sec=HANG)
    assert again is not None
    assert "the network between them is cut" in again.text


def test_a_rank_or_a_node_that_is_gone_is_told() -> None:
    waiting = view(0, "all-reduce", 9, 8.1, waits=True)
    verdict = decide([waiting, view(1, "forward", 9, 0.0, state=LEFT)], hang_sec=HANG)
    assert verdict is not None
    assert "they wait for rank 1 on host, which has ended" in verdict.text
    verdict = decide([waiting], hang_sec=HANG, lost=["node7"])
    assert verdict is not None
    assert "node7 is not heard of" in verdict.text
    assert blamed(view(0, "end", 9, 99.0, state=LEFT)) is None


def in_vain(*views: View, on_gpu: bool = True) -> bool:
    """Say whether the ranks are ended because they wait for one that is gone."""
    verdict = decide(views, hang_sec=HANG, on_gpu=on_gpu)
    assert verdict is None or verdict.culprits == ()
    return verdict is not None and "which has ended" in verdict.text


@pytest.mark.parametrize("state", ["gone", LEFT])
def test_on_gpus_nobody_waits_longer_than_a_second_for_a_rank_that_is_gone(state: str) -> None:
    waiting = view(0, "all-reduce", 9, 1.1, waits=True)
    gone = view(1, "forward", 9, 1.1, state=state, gone_sec=1.1)
    assert in_vain(waiting, gone)
    assert in_vain(waiting, waiting._replace(rank=2), gone)
    for phase in ("forward", "backward"):  # where DDP sums, and a device's queue fills up
        assert in_vain(view(0, phase, 9, 1.1), gone)
        assert not in_vain(view(0, phase, 9, 0.9), gone)
        assert not in_vain(view(0, phase, 9, 1.1), gone, on_gpu=False)
    assert not in_vain(view(0, "checkpoint", 9, 1.1), gone), "it may be saving"
    assert not in_vain(waiting, gone, on_gpu=False), "there the network tells them"
    assert not in_vain(waiting, gone._replace(gone_sec=0.9))
    assert not in_vain(waiting._replace(silence=0.9), gone)
    assert not in_vain(waiting, view(2, "end", 9, 1.1), gone), "that one says what it knows"


class Life:
    """A rank's heartbeats over made-up time, as its monitor reads them."""

    def __init__(self, **limits: float) -> None:
        settings = {"hang_sec": HANG, "start_sec": 1800.0, "step_sec": 300.0} | limits
        self.limits = Limits(**settings)
        self.beat = Beat(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    def go(self, phase: Phase, step: int, seconds: float, batches: int = 0) -> float:
        """Beat, then be silent for so long; returns the limit in force."""
        beats, now = self.beat.beats + 1, self.beat.at_ns
        self.beat = self.beat._replace(
            phase=NUMBER_OF[phase], step=step, beats=beats, at_ns=now, batches=batches
        )
        self.limits.look(self.beat, 0.0, paused=False)
        for _ in range(round(seconds / 0.1)):
            self.limits.look(self.beat, 0.1, paused=False)
        self.beat = self.beat._replace(at_ns=now + round(1e9 * seconds))
        return self.limits.limit

    def train(self, steps: int, seconds: float) -> float:
        """Take steps of equal length; returns the limit in a forward after them."""
        first = self.beat.step
        for step in range(first + 1, first + steps + 1):
            self.go("data", step, seconds / 2)
            self.go("forward", step, seconds / 2)
        return self.limits.limit


def test_until_steps_are_known_the_timeouts_of_start_and_collectives_hold() -> None:
    life = Life()
    assert life.go("start", 0, 100.0) == 1800.0
    assert life.go("forward", 0, 40.0) == 300.0, "compilation"
    assert life.train(3, 0.2) == 300.0
    assert life.train(20, 0.2) == HANG


def test_after_a_rollback_the_first_steps_have_the_time_of_first_steps() -> None:
    """Loader workers start again, and their first batch has nothing fetched ahead."""
    life = Life()
    assert life.train(20, 0.2) == HANG
    assert life.go("data", 5, 20.0) == 300.0
    assert life.train(3, 0.2) == 300.0
    assert life.train(5, 0.2) == HANG


def test_the_limit_is_ten_median_steps_or_the_floor() -> None:
    assert Life().train(20, 0.2) == HANG
    assert Life().train(20, 2.0) == pytest.approx(20.0)


def test_a_pause_that_ended_well_teaches_patience_in_its_phase() -> None:
    life = Life()
    life.train(20, 0.2)
    life.go("data", 21, 4.0)
    assert life.go("data", 22, 0.1) == pytest.approx(12.0, abs=0.5)
    assert life.go("forward", 22, 0.1) == HANG


def test_an_evaluation_is_measured_by_its_own_batches() -> None:
    life = Life()
    life.train(20, 0.2)
    assert life.go("evaluation", 20, 20.0, batches=1) == 300.0, "nothing is known of its batches"
    assert life.go("evaluation", 20, 0.1, batches=2) == pytest.approx(200.0, abs=1.0)


def test_a_save_has_longer_as_long_as_bytes_move() -> None:
    life = Life()
    life.train(20, 0.2)
    assert life.go("checkpoint", 20, 50.0) == pytest.approx(60.0)
    life.limits.move()
    assert life.limits.silence == 0.0


def test_time_in_which_the_rank_was_suspended_does_not_count() -> None:
    life = Life()
    life.go("forward", 1, 1.0)
    for _ in range(100):
        life.limits.look(life.beat, 0.2, paused=True)
    assert life.limits.silence == pytest.approx(1.0)


def found_slow(
    busy_ms: list[list[float]], *, looks: int = 8, step_ms: float = 100.0, no_core_ms: float = 0.0
) -> list[int]:
    """Return the ranks named; busy_ms[look % len][rank] is the work of a step."""
    stragglers, named = Stragglers(), []
    busy, now = [0.0] * len(busy_ms[0]), 0.0
    for number in range(looks):
        delay = [0] * (len(busy) - 1) + [round(10 * number * no_core_ms * 1e6)]  # of the last rank
        views = [
            view(rank, "data", 10 * number, 0.0, busy_ns=round(ns), delay_ns=delay[rank])
            for rank, ns in enumerate(busy)
        ]
        named += [slow.rank for slow in stragglers.look(views, now)]
        now += 10 * step_ms / 1e3
        for rank, sec in enumerate(busy_ms[number % len(busy_ms)]):
            busy[rank] += 10 * sec * 1e6
    return named


def test_a_slow_rank_is_named_once_within_fifty_steps() -> None:
    assert found_slow([[50.0, 80.0, 52.0]]) == [1]
    assert found_slow([[50.0, 80.0]], looks=6) == [1], "6 looks are 50 steps"
    assert found_slow([[50.0, 80.0]], looks=5) == []


def test_what_is_equal_noisy_or_cheap_is_not_slow() -> None:
    assert found_slow([[50.0, 55.0, 52.0]]) == []
    assert found_slow([[50.0, 200.0], [50.0, 50.0]]) == [], "every other window"
    assert found_slow([[1.0, 3.0]]) == [], "2 ms of a step of 100"
    assert found_slow([[50.0, 80.0]], no_core_ms=30.0) == [], "the machine is overloaded"


def test_a_rank_whose_loader_has_no_core_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for its batch, which is work that somebody has to do."""
    delays, found = {1: 500, 11: 7000, 12: 9000, 2: 40}, {1: [(11, 0)], 11: [(12, 0)]}
    monkeypatch.setattr(processes, "core_delay_ns", lambda pid: delays.get(pid, 0))
    monkeypatch.setattr(processes, "all_children", lambda: dict(found))
    core = processes.CoreDelays()
    assert (core.of(1, 0.0), core.of(2, 0.0)) == (0, 0), "what was before counts for nobody"
    delays.update({1: 600, 11: 7300, 12: 9200, 2: 45})
    assert (core.of(1, 1.0), core.of(2, 1.0)) == (400, 5), "its own, and the longer of the two"
    found[1] = [(13, 0)]  # an epoch later
    delays.update({1: 610, 13: 80})
    assert core.of(1, 1.0 + processes.CHILDREN_SEC) == 410
    delays[13] = 100
    assert core.of(1, 2.0 + processes.CHILDREN_SEC) == 430


def test_the_phases_are_in_the_order_of_a_step() -> None:
    loop = ["logging", "evaluation", "checkpoint", "data", "forward", "backward", "all-reduce"]
    assert list(PHASES) == ["start", *loop, "optimizer", "end"]


def test_only_work_is_counted_as_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    pulse = Pulse()
    pulse.at("data", 0)
    now += 1
    with pulse.calling("barrier"):
        now += 10
    now += 100
    pulse.at("checkpoint", 0)
    now += 1000
    pulse.at("forward", 0)
    now += 10000
    pulse.at("end", 0)
    assert pulse._busy == 10101


def test_waiting_for_the_norm_on_a_gpu_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a collective returns at once: all ranks wait for the slow one where they read it."""
    busy = {}
    for on_gpu in (False, True):
        now = 1000
        monkeypatch.setattr(time, "monotonic_ns", lambda: now)  # noqa: B023 # read at once
        with mmap.mmap(-1, SLOT_BYTES) as memory:
            pulse = Pulse()
            pulse.attach(memory, 0, Identity(HERE, 0, 1, 1, 1), on_gpu=on_gpu)
            pulse.at("forward", 0)
            now += 1
            pulse.at("all-reduce", 0)
            now += 10
            pulse.at("optimizer", 0)
            now += 100
            pulse.at("logging", 0)
            busy[on_gpu] = read_beat(memory, 0).busy_ns
            pulse.leave()
    assert busy == {False: 111, True: 101}


def test_what_the_monitor_records_has_the_form_of_the_runs_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, dataclasses.replace(single_process(), chain="c"))
    folder.set_status("failed", step=3, reason="x")
    folder.event("saved", step=3)
    own = folder.read_status()
    (tmp_path / "status.json").unlink()
    place = Place(str(tmp_path), "host", attempt=0, chain="c", node=0, nodes=1)
    record_failure(place, Verdict((1,), 1, 5, "rank 1 hangs"))
    append_event(place, "hang", step=5, rank=1)
    mine = folder.read_status()
    assert list(mine) == list(own)
    assert (mine["state"], mine["rank"], mine["step"]) == ("failed", 1, 5)
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert list(lines[0]) == list(lines[1])
    record_failure(place, Verdict((0,), 0, 6, "later"))
    assert folder.read_status()["reason"] == "rank 1 hangs", "the first failure is believed"


def test_a_process_and_what_it_started_are_seen_and_killed() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    while not (children := descendants(parent.pid)):
        time.sleep(0.02)
    stat = read_stat(parent.pid)
    assert stat is not None
    assert stat.parent == os.getpid()
    assert state_of(parent.pid, stat.started + 1) == "gone", "another process of this number"
    kill(parent.pid, stat.started + 1)
    assert parent.poll() is None
    for pid, started in [*children, (parent.pid, stat.started)]:
        kill(pid, started)
    assert parent.wait() == -9
    parent.communicate()


def test_a_disk_that_hangs_or_fails_delays_nothing() -> None:
    start = time.monotonic()
    within(0.1, lambda: time.sleep(5))
    assert time.monotonic() - start < 4

    def fail() -> None:
        raise OSError("no space")

    within(5, fail)
    assert time.monotonic() - start < 4


def test_monitors_hear_of_each_other_and_not_of_strangers() -> None:
    hub_end = hub_socket()
    port = hub_end.getsockname()[1]
    hub = Link(hub_end, node=0, is_hub=True, secret="s" * 32)
    with hub_end, socket_to("localhost", port) as end, socket_to("localhost", port) as strange:
        other = Link(end, node=1, is_hub=False, secret="s" * 32)
        stranger = Link(strange, node=2, is_hub=False, secret="x" * 32)
        stranger.exchange([view(7, "data", 1, 0.0)], "c")
        other.exchange([view(1, "forward", 3, 2.0)], "b")
        verdict = Verdict((1,), 1, 3, "rank 1 hangs")
        while not hub.num_nodes_heard():
            hub.exchange([], "a", verdict)
            time.sleep(0.01)
        assert hub.others() == [view(1, "forward", 3, 2.0)]
        while not other.word_of_hub()[0]:
            hub.exchange([], "a", verdict)
            other.exchange([], "b")
            time.sleep(0.01)
        assert other.word_of_hub() == (True, verdict, True)
