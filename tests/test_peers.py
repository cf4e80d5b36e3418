"""The loop against the same job written by hand: the same bits, so that their speeds compare."""

import gc
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.intervals import RESULTS, write_between
from benchmarks.peers import __main__ as command
from benchmarks.peers import loops, records
from benchmarks.peers.job import CASES, SETTLED, Batches, Case, Clocks, Job, measured
from benchmarks.peers.one_round import reason_in, run_round
from benchmarks.peers.records import Cell, Outcome, Record
from benchmarks.peers.table import make_tables
from benchmarks.peers.worker import GO, TURNS
from benchmarks.reliability.in_ranks import wait_until
from dist_train.monitor.processes import read_stat
from tests.ranks import run_ranks

SHORT = Case("benchmarks.peers.job:tiny_net", 16, epochs=2, first=0, turns=2, turn=40)
CELL = Cell("tiny", "lean", 1, "fp32")
HERE = {"cpu": "this one", "torch": "2.14", "code": "abc"}
BASE = Record(
    series="one", surroundings=HERE, date="2026", cell=CELL, round=0, peer="", outcome=Outcome()
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: several wait for each other on a busy machine
    yield
    torch.set_num_threads(before)


def end_of(peer: str, world_size: int, folder: Path) -> str:
    """Return the digest of the weights that a peer ends with."""
    from benchmarks.peers import ours

    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    job = Job(SHORT, rank, world_size, precision="fp32", lean=True, folder=folder)
    train = {"fast": loops.fast, "ours": ours.ours}[peer]
    result = measured(job, train(job), begun=0.0)
    assert result["steps"] == SHORT.epochs * 97
    return str(result["weights_sha256"])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loop_has_the_bits_of_one_written_by_hand(world_size: int, tmp_path: Path) -> None:
    ours = run_ranks(end_of, world_size, "ours", world_size, tmp_path)
    fast = run_ranks(end_of, world_size, "fast", world_size, tmp_path)
    assert len({*ours, *fast}) == 1


def digest_of(weights: dict[str, torch.Tensor], job: Job) -> tuple[object, object]:
    result = measured(job, weights, begun=0.0)
    return result["weights_sha256"], result["norm"]


def test_a_rank_s_own_running_statistics_are_not_compared(tmp_path: Path) -> None:
    job = Job(CASES["resnet9"], 0, 1, precision="fp32", lean=True, folder=tmp_path)
    job.turns = [(Clocks(0.0, 0.0, 0.0), Clocks(1.0, 1.0, 1.0))]
    model = job.model()
    here = digest_of(model.state_dict(), job)
    for buffer in model.buffers():
        buffer.add_(1)
    assert digest_of(model.state_dict(), job) == here
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert digest_of(model.state_dict(), job) != here


class OlderWrapper(nn.Module):
    """DistributedDataParallel by the arguments of torch 2.11."""

    def __init__(
        self, module: nn.Module, *, broadcast_buffers: bool, gradient_as_bucket_view: bool
    ) -> None:
        super().__init__()
        self.module = module
        assert not broadcast_buffers

    def forward(self, images: torch.Tensor) -> Any:
        return self.module(images)


def test_the_fast_loop_runs_on_an_older_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "DistributedDataParallel", OlderWrapper)
    monkeypatch.setattr(Job, "start_group", lambda job: None)
    job = Job(SHORT, 0, 2, precision="fp32", lean=True, folder=tmp_path)
    assert loops.fast(job)
    assert job.asked == job.total_steps


@pytest.mark.slow
def test_the_fast_loop_spares_the_garbage_collector_what_lives_and_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    append, take = frozen.append, Batches.take
    monkeypatch.setattr(Batches, "take", lambda b: append(gc.get_freeze_count()) or take(b))
    loops.fast(Job(SHORT, 0, 1, precision="fp32", lean=True, folder=tmp_path))
    assert frozen[SETTLED - 1] == gc.get_freeze_count() == 0
    assert frozen[SETTLED] > 1000


def user_sec(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def test_what_a_child_process_costs_counts_within_the_turns_only(tmp_path: Path) -> None:
    waits: list[int] = []  # the steps done before each

    def wait() -> None:
        waits.append(job.asked)
        time.sleep(0.5)

    job = Job(SHORT, 0, 1, precision="fp32", lean=True, folder=tmp_path, wait_for_turn=wait)
    batches = Batches(job)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        for step in range(job.total_steps):
            if step == SHORT.turn:  # the end of the first turn
                begin = user_sec(child.pid)
                while user_sec(child.pid) < begin + 0.3:  # however busy the machine is
                    time.sleep(0.05)
            batches.take()
        child.kill()
    assert waits == [0, 40, 80]
    costs = [end.children_sec - begin.children_sec for begin, end in job.turns]
    assert costs[0] > 0.1 > costs[1]
    found = measured(job, job.model().state_dict(), begun=0.0)
    assert float(str(found["children_us"])) == pytest.approx(1e6 * sum(costs) / 80)
    assert job.children_mib > 1


def record_of(peer: str, number: int, cpu_us: float = 1e3, *, base: Record = BASE) -> Record:
    values = {"cpu_us": cpu_us, "children_us": 3.0, "images_per_sec": 1e8 / cpu_us, "norm": 1.0}
    values |= {"peak_rss_mib": 700.0, "first_step_sec": cpu_us / 500}
    values |= {"throw_away_sec": 0.5, "first_step_apart_sec": cpu_us / 500 - 0.5}
    outcome = Outcome(values=values, weights_sha256="a")
    return replace(base, round=number, peer=peer, outcome=outcome)


def failed(peer: str, number: int, reason: str) -> Record:
    return replace(BASE, round=number, peer=peer, outcome=Outcome(failed=reason))


def row_of(peer: str, table: str) -> list[str]:
    """Return the cells of the peer's only row."""
    [line] = [x for x in table.splitlines() if x.startswith((f"| {peer} ", f"| {peer};"))]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_differences_and_ratios_are_paired_by_round() -> None:
    runs = []
    for n, slow in enumerate((1.0, 1.5, 2.0)):  # what else the machine does slows all in a round
        runs += [record_of("plain", n, 1000 * slow), record_of("fabric", n, 1100 * slow)]
        runs += [record_of("fast", n, 800 * slow), record_of("ours", n, 800 * slow + 10 + n)]
        runs += [record_of("ignite", n, 800 * slow + 510)]
    table = make_tables(runs)["tiny"]
    assert row_of("ours", table)[1:5] == ["1,211", "-289 +- 246", "+11 +- 2", ""]
    assert row_of("fast", table)[3:5] == ["", "+11 +- 2, behind"]
    assert row_of("ignite", table)[4] == "-499 +- 2, ahead"
    assert row_of("fabric", table)[2] == "+150 +- 124"
    same = [f"{ratio} ({ratio} to {ratio})" for ratio in ("0.909", "1.100", "1.000")]
    assert row_of("fabric", table)[5:] == same
    assert row_of("plain", table)[5:] == ["72,222 images/s", "3.00 s", "700 MiB"]


def test_the_first_step_is_told_with_and_without_the_one_thrown_away() -> None:
    runs = [record_of("plain", n, 1000.0 + 100 * n) for n in range(3)]
    for run in runs:
        apart = run.outcome.values["first_step_sec"]
        run.outcome.values.update(throw_away_sec=0.0, first_step_apart_sec=apart)
    runs += [record_of("ours", n, 1100.0 + 100 * n) for n in range(3)]
    table = make_tables(runs)["tiny"]
    assert "ours over plain: +0.20 +- 0.00 s; without its throw-away step of 0.50 s: -0.30" in table


def test_one_round_has_no_interval() -> None:
    table = make_tables([record_of("plain", 0), record_of("ours", 0, 900.0)])["tiny"]
    assert row_of("ours", table)[2] == "-100, once"
    assert row_of("plain", table)[4] == "-100, once"  # not called ahead
    assert "inf" not in table


def test_a_failed_round_is_told_and_left_out_of_the_pairs() -> None:
    runs = [record_of(peer, n, 1000.0 * (n + 1)) for peer in ("plain", "ours") for n in range(3)]
    runs += [record_of("fast", n, 1000.0 * (n + 1) - 100) for n in (0, 2)]
    runs += [failed("fast", 1, "not done within 600 s")]
    runs += [failed("fabric", n, "ValueError: a | b") for n in range(3)]
    table = make_tables(runs)["tiny"]
    assert row_of("fast; failed in 1 of 3 rounds: not done within 600 s", table)[2] == "-100 +- 0"
    assert row_of("fabric; failed in 3 of 3 rounds: ValueError: a / b", table)[1:] == [""] * 7


def test_peers_that_did_another_job_have_failed() -> None:
    runs = [record_of(peer, n) for n in (0, 1) for peer in ("fabric", "plain", "fast", "ours")]
    other = replace(runs[0].outcome, weights_sha256="b")
    runs[0], runs[5] = replace(runs[0], outcome=other), replace(runs[5], outcome=other)
    runs[1].outcome.values["norm"] = 1.01
    wrong = {(r.peer, r.round): r.outcome.failed for r in records.judged(runs) if r.outcome.failed}
    assert set(wrong) == {("fabric", 0), ("plain", 0)}  # plain may have other bits
    assert wrong["fabric", 0] == "another job: its weights are b, not a"
    assert "norm is 1.01, not 1" in str(wrong["plain", 0])


def test_a_series_goes_on_in_the_same_surroundings_only(tmp_path: Path) -> None:
    moved = replace(BASE, series="three", surroundings=HERE | {"code": "def"})
    runs = [record_of("plain", 0), replace(failed("plain", 0, "broke"), series="two")]
    runs.append(record_of("plain", 0, base=moved))
    for run in runs:
        records.append(tmp_path / "new" / "file.jsonl", run)
    assert records.read(tmp_path / "new" / "file.jsonl") == runs
    assert records.series_to_continue(runs, HERE) == "two"
    assert records.series_to_continue(runs, HERE | {"cpu": "another"}) is None
    table = make_tables(runs)["tiny"]
    assert "code def" in table
    assert "code abc" not in table


def test_a_rerun_does_what_is_missing_and_again_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = tmp_path / "peers.jsonl", []

    def first_fails_and_the_third_is_stopped(
        python: str, peers: Sequence[str], cell: Cell, *, seed: int
    ) -> dict[str, Outcome]:
        ran.append((cell.precision, seed))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {
            peer: (failed(peer, 0, "broke") if len(ran) == 1 else record_of(peer, 0)).outcome
            for peer in peers
        }

    def run(*words: str) -> int:
        cell = ("--ranks", "1", "--precisions", "fp32", "bf16", "--peers", "plain", "ours")
        monkeypatch.setattr(sys, "argv", ["peers", "run", *cell, "--file", str(path), *words])
        return command.main()

    monkeypatch.setattr(command, "run_round", first_fails_and_the_third_is_stopped)
    here = HERE | {"code": records.code_digest()}
    monkeypatch.setattr(records, "surroundings", lambda python: here)
    with pytest.raises(KeyboardInterrupt):
        run("--rounds", "3")
    assert len(records.read(path)) == 4
    assert run("--rounds", "3") == 1  # one failed before: it is not repeated until it passes
    assert ran[3:] == [ran[2], ("bf16", 1), ("fp32", 2), ("bf16", 2)]
    assert len(records.read(path)) == 12
    assert run("--rounds", "1", "--again") == 0
    assert len({r.series for r in records.read(path)[:12]}) == 1
    assert len({r.series for r in records.read(path)[11:]}) == 2


def test_a_round_that_had_fewer_peers_is_not_filled_up_later() -> None:
    other = Cell("tiny", "lean", 2, "fp32")
    kept = [record_of("plain", 0), record_of("ours", 0), record_of("plain", 1)]
    kept.append(record_of("plain", 0, base=replace(BASE, cell=other)))
    to_do = command.rounds_to_do(kept, [CELL, other], ["plain", "ours"], 3)
    assert to_do == [(1, other), (2, CELL), (2, other), (3, CELL), (3, other)]
    assert command.rounds_to_do(kept, [CELL], ["plain"], 2) == []


def test_cases_and_styles_have_tables_of_their_own(tmp_path: Path) -> None:
    resnet9, default = Cell("resnet9", "lean", 1, "fp32"), Cell("tiny", "default", 1, "fp32")
    other = replace(BASE, cell=default, series="two", surroundings=HERE | {"code": "def"})
    runs = [record_of("plain", 0), record_of("plain", 0, 5e3, base=other)]
    runs += [record_of("plain", 0, 9e6, base=replace(BASE, cell=resnet9, series="later"))]
    tables = make_tables(runs)
    lean, rest = tables["tiny"].split("**1 rank, fp32, default**, 1 round:")
    assert "**1 rank, fp32, lean**, 1 round:" in lean
    assert lean.index("code abc") < lean.index("code def"), "each of a series of its own"
    assert (row_of("plain", lean)[1], row_of("plain", rest)[1]) == ("1,000", "5,000")
    assert row_of("plain", tables["resnet9"])[1] == "9,000,000"
    assert len({records.file_of(case) for case in CASES}) == len(CASES)
    copy = tmp_path / "RESULTS.md"
    copy.write_text(RESULTS.read_text())
    for case in CASES:
        write_between(copy, f"peers-{case}", tables[case])
    assert all(tables[case].strip() in copy.read_text() for case in CASES)


STAND_IN = f"""#!{sys.executable} -S
import json, os, socket, subprocess, sys, time
peer, folder = sys.argv[3], sys.argv[sys.argv.index("--folder") + 1]
def note(*words):
    with open("LOG", "a") as file:
        print(*words, file=file)
def take_turns(count):
    door = socket.socket(socket.AF_UNIX)
    door.connect(os.path.join(folder, {TURNS!r}))
    for _ in range(count):
        note(peer, "waits")
        door.sendall({GO!r})
        if door.recv(1) != {GO!r}:
            sys.exit(9)
        note(peer, "goes")
def leave_result():
    with open(os.path.join(folder, "rank0.json"), "w") as file:
        json.dump({{"weights_sha256": "a", "cpu_us": 1.0}}, file)
"""
ALL = CASES[CELL.case].turns + 1  # how often a peer is told to go on


def stand_in(folder: Path, text: str) -> str:
    """Return the path of a program in place of a Python that runs a worker."""
    path = folder / "python"
    path.write_text(STAND_IN.replace("LOG", str(folder / "log")) + text)
    path.chmod(0o755)
    return str(path)


def one(python: str, peer: str = "plain", limit_sec: float = 60.0) -> Outcome:
    return run_round(python, [peer], CELL, seed=0, limit_sec=limit_sec)[peer]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [0, 2, ALL])
def test_a_peer_that_takes_too_long_has_failed_and_leaves_no_rank(
    turns: int, tmp_path: Path
) -> None:
    python = stand_in(
        tmp_path,
        f"""
sleep = [sys.executable, "-S", "-c", "import time; time.sleep(100)"]
note(subprocess.Popen([*sleep, folder], start_new_session=True).pid)  # as torchrun starts its ranks
note(subprocess.Popen(sleep).pid)
if {turns}:
    take_turns({turns})
time.sleep(100)
""",
    )
    assert one(python, limit_sec=5.0).failed == "not done within 5 s"
    rank, child, *events = (tmp_path / "log").read_text().split()
    assert events.count("goes") == turns
    wait_until(
        lambda: not (read_stat(int(rank)) or read_stat(int(child))), "one of them lives", 5.0
    )


def test_a_peer_that_does_not_end_well_has_failed_and_says_why(tmp_path: Path) -> None:
    error = "ModuleNotFoundError: No module named x"
    reasons = {
        f"sys.exit('{error}')": error,
        "sys.exit(3)": "ended with 3",
        "take_turns(2); sys.exit(5)": "ended with 5",
        f"take_turns({ALL})": "0 of 1 ranks left a result",
        "leave_result()": "it did not take all its turns",
        "take_turns(5); leave_result()": "it did not take all its turns",
    }
    for text, why in reasons.items():
        assert one(stand_in(tmp_path, text), "fabric").failed == why


def test_peers_take_turns_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    text = f"""
take_turns(3 if peer == "fabric" else {ALL})
leave_result()
sys.exit(peer == "fabric")
"""
    found = run_round(stand_in(tmp_path, text), ["plain", "fabric", "ours"], CELL, seed=0)
    failures = {peer: outcome.failed for peer, outcome in found.items()}
    assert failures == {"plain": None, "fabric": "ended with 1", "ours": None}
    events = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    order: list[str] = []
    for (peer, what), after in itertools.pairwise(events):
        if what == "goes":  # alone, until it waits again or has ended
            order.append(peer)
            if order.count(peer) < (3 if peer == "fabric" else ALL):
                assert after == [peer, "waits"]
    late = [tuple(order[n : n + 2]) for n in range(9, 2 * ALL, 2)]  # when fabric has ended
    assert set(late) == {("plain", "ours"), ("ours", "plain")}  # each turn has an order of its own


def test_the_reason_is_what_the_first_rank_raised() -> None:
    ranks = "  raise ValueError\n[rank1]: a.b.SomeError: none such\n[rank0]: RuntimeError: closed\n"
    summary = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert reason_in(ranks + summary) == "a.b.SomeError: none such"
    assert reason_in(summary) is None
