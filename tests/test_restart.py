"""`dist-train run` under fire: it restarts, says why, gives up in time, and leaves no process."""

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train import agent, chain, chain_status
from dist_train.config.arguments import NODES_VARIABLE, VERDICT_VARIABLE, tell_met
from dist_train.layout import ATTEMPT_VARIABLE
from launch import supervise
from tests.faults import train_with
from tests.ranks import free_port, run_ranks, start_ranks_of
from tests.settings import SMALL, metrics, small
from tests.test_resume import HARD
from tests.test_torchrun import REPOSITORY, ranks_of, torchrun_with, trained


def dist_train_run(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "run", "--nproc", "2", *SMALL]
    return subprocess.Popen(
        [*command, f"run_dir={folder}", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(folder: Path, module: str, attempt: int = 0) -> list[int]:
    """Return the processes of the run that run `module`; of ranks, those of an attempt."""
    found = []
    for number in ranks_of(folder):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        of_attempt = f"TORCHELASTIC_RESTART_COUNT={attempt}".encode() in variables
        launcher = words[1:3] == [b"-m", b"launch.cli"]
        if module.encode() in words and not launcher and (of_attempt or module != "dist_train"):
            found.append(number)
    return sorted(found)


def wait_for_lines(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


FINAL = {  # the kind of end, and what the last line says of it
    "exception": "rank 1 failed at step 3: RuntimeError: an injected exception",
    "KeyboardInterrupt": "rank 1 failed at step 3: KeyboardInterrupt",
    "sys.exit": "rank 1 failed at step 3: SystemExit: 0",
    "segfault": "rank 1 was killed by SIGSEGV; its stack is in",
    "abort": "rank 1 was killed by SIGABRT; its stack is in",
    "exit": "rank 1 ended with exit code 1 and no word",
    "exit 0": "rank 1 ended without a word",
    "kill": "rank 1 was killed by SIGKILL",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FINAL)
def test_the_final_message_names_the_first_cause(kind: str, tmp_path: Path) -> None:
    words = ["model.factory=tests.nets:failing_net", f"model.args.kind='{kind}'"]
    process = dist_train_run(tmp_path, *words, "--max-restarts", "0")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert FINAL[kind] in errors.splitlines()[-1]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "connection closed" not in errors.lower(), "a rank that only followed has spoken"
    assert ranks_of(tmp_path) == []


@pytest.mark.slow
def test_the_same_exception_three_times_ends_with_93(tmp_path: Path) -> None:
    words = ["model.factory=tests.nets:failing_net", "model.args.kind=exception"]
    process = dist_train_run(tmp_path, *words)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 93, errors
    last = errors.splitlines()[-1]
    assert re.search(r"RuntimeError: an injected exception at \S*tests/faults\.py:\d+ in", last)
    assert "(3 times, at the same step)" in last
    assert errors.count("RuntimeError: an injected exception\n  at ") == 3, "its place, each time"
    traces = sorted((tmp_path / "log").glob("failure-*-rank1.txt"))
    assert len(traces) == 3
    assert all("Traceback (most recent call last)" in path.read_text() for path in traces)
    assert errors.count("dist-train: attempt") == 2, "a line for each restart, and no third one"
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["exit_code"], status["attempt"], status["step"]) == (93, 2, 3)
    assert ranks_of(tmp_path) == []


def test_the_tenth_death_without_progress_is_the_last(tmp_path: Path) -> None:
    config = small(tmp_path)
    chain.begin(tmp_path_log(tmp_path), chain="c", attempt=0, world_size=2, step=0, stopped=False)
    for number in range(1, 10):
        chain.begin(tmp_path, chain="c", attempt=number, world_size=2, step=0, stopped=False)
    env = {"DIST_TRAIN_CHAIN": "c", "TORCHELASTIC_RESTART_COUNT": "10"}
    outcomes = start_ranks_of(train_with, 2, config, None, env=env)
    assert [getattr(o.error, "exit_code", None) for o in outcomes] == [93, 93], outcomes[0].trace
    assert "10 attempts in a row ended without a checkpoint" in str(outcomes[1].error)
    assert json.loads((tmp_path / "status.json").read_text())["exit_code"] == 93
    assert run_ranks(train_with, 2, config, None)[0]["state"] == "finished", "a new command may"


def tmp_path_log(folder: Path) -> Path:
    (folder / "log").mkdir()
    return folder


A_DEATH = logging.LogRecord(
    agent.LOGGER, logging.ERROR, "", 0, f"{agent.FAILED}: ...", (-11, 1, 7, "python"), None
)


def test_ten_attempts_that_never_begin_end_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain, "back_off", lambda endings: 0.0)
    report = agent._Report(tmp_path, "c", tmp_path / "verdict.json")
    for _ in range(9):
        report.emit(A_DEATH)
    with pytest.raises(SystemExit) as ended:
        report.emit(A_DEATH)
    assert ended.value.code == 93
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert "attempt 8 ended: local rank 1 was killed by SIGSEGV" in lines[8]
    assert "10 attempts in a row ended without a checkpoint beyond step 0" in lines[9]


def test_a_machine_that_does_not_see_the_run_counts_no_attempts_of_ranks_that_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of several machines has a chain of its own: rank 0's counts."""
    monkeypatch.setenv(VERDICT_VARIABLE, str(tmp_path / "verdict.json"))
    monkeypatch.setenv(NODES_VARIABLE, "2")
    report = agent._Report(tmp_path / "elsewhere", "mine", tmp_path / "verdict.json")
    for attempt in range(12):
        tell_met("that of rank 0", attempt)
        report.emit(A_DEATH)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 12
    assert "attempt 11 ended" in told[-1]


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 2, 93])
def test_how_the_launch_before_ended_is_not_how_this_one_did(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A requeued job keeps its chain, and ranks may die before they have claimed the folder."""
    state = "failed" if code else "preempted"
    status = {"chain": "slurm-77", "attempt": 3, "state": state, "exit_code": code, "reason": "old"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    monkeypatch.setenv(ATTEMPT_VARIABLE, "4")
    agent._Report(tmp_path, "slurm-77", tmp_path / "verdict.json").emit(A_DEATH)
    assert "attempt 4 ended: local rank 1 was killed" in capsys.readouterr().err
    monkeypatch.setattr(supervise, "TIDY_SEC", 0.0)
    command = [sys.executable, "-c", "import time; time.sleep(4); raise SystemExit(7)"]
    ended = supervise.supervise(command, dict(os.environ), tmp_path, chain="slurm-77", attempt=4)
    assert ended == 7
    assert "old" not in capsys.readouterr().err
    chain_status.forget(tmp_path)
    assert chain_status.status_of(tmp_path, "slurm-77", 0) == {}


def test_a_chain_that_another_machine_has_ended_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would wait for that machine. status.json is written a moment after chain.json."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv(NODES_VARIABLE, "2")
    report = agent._Report(tmp_path, "that of rank 0", tmp_path / "verdict.json")
    told = None
    for attempt in range(3):
        chain.begin(
            tmp_path, chain="that of rank 0", attempt=attempt, world_size=2, step=0, stopped=False
        )
        cause = chain.Cause(attempt=attempt, rank=1, step=3, type="KeyboardInterrupt")
        told = chain.record(tmp_path, "that of rank 0", cause)
        if attempt < 2:
            report.emit(A_DEATH)
    assert told is not None
    with pytest.raises(SystemExit) as ended:
        report.emit(A_DEATH)
    assert ended.value.code == 93
    assert capsys.readouterr().err.count("dist-train: attempt") == 2
    status = {"chain": "that of rank 0", "attempt": 2, "state": "failed", "exit_code": 93}
    (tmp_path / "status.json").write_text(json.dumps(status | {"reason": "3 times"}))
    monkeypatch.setattr(supervise, "TIDY_SEC", 0.0)
    waits = [sys.executable, "-c", "import time; time.sleep(600)"]
    code = supervise.supervise(waits, dict(os.environ), tmp_path, chain="that of rank 0")
    assert code == 93


@pytest.mark.slow
def test_a_kill_on_the_second_machine_is_the_chains_of_rank_0(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words += ["model.factory=tests.nets:paced_net", "model.args.sec=0.05", "log_every=1"]
    words += ["checkpoint.every_steps=5", "train.steps=40"]
    machines = [dist_train_run(run, *words) for _ in range(2)]
    wait_for_lines(machines[0], run, 12)
    ranks = {
        number: Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        for number in processes(run, "dist_train")
    }
    [second] = [number for number, variables in ranks.items() if b"RANK=1" in variables]
    os.kill(second, signal.SIGKILL)
    ends = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("finished", 1)
    assert chain.read(run).chain == status["chain"], "the other machine's took over"


@pytest.mark.slow
def test_the_same_failure_on_the_second_machine_ends_both_with_93(tmp_path: Path) -> None:
    words = ["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words += ["model.factory=tests.nets:failing_net", "model.args.kind=KeyboardInterrupt"]
    machines = [dist_train_run(tmp_path / "run", *words) for _ in range(2)]
    ends = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [93, 93], ends
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["exit_code"], status["attempt"]) == (93, 2)
    assert "(3 times, at the same step)" in status["reason"]


@pytest.mark.exhaustive
def test_a_second_kill_while_recovering_changes_no_bit(tmp_path: Path) -> None:
    clean = run_ranks(trained, 2, small(tmp_path / "clean", *HARD, "train.steps=600"))[0]
    folder, dice = tmp_path / "run", random.Random(7)
    process = dist_train_run(folder, *HARD, "train.steps=600", "log_every=5")
    wait_for_lines(process, folder, 4)
    os.kill(dice.choice(processes(folder, "dist_train", 0)), signal.SIGKILL)
    for attempt in (1, 2):  # at a random moment of the next ones' start
        while len(found := processes(folder, "dist_train", attempt)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 3))
        os.kill(dice.choice(found), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("dist-train: attempt") == 3, "a kill that hit nothing"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == clean["weights_sha256"]
    assert ranks_of(folder) == []


@pytest.mark.exhaustive
def test_torchrun_restarts_five_times_of_five(tmp_path: Path) -> None:
    faults = [
        {"rank": n % 2, "step": 0, "place": "before the step", "mark": str(tmp_path / f"f{n}")}
        for n in range(5)
    ]
    out, _ = torchrun_with(faults, "train.steps=2", f"run_dir={tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["attempt"] == 5
    assert "restart 5 from step 0, in 8 s: rank 0 died without a word" in out


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["launch.cli", "dist_train.agent"])
def test_nothing_is_left_when_a_launcher_is_killed(victim: str, tmp_path: Path) -> None:
    process = dist_train_run(tmp_path, "train.steps=1000000", "eval.every_epochs=null")
    wait_for_lines(process, tmp_path, 3)
    if victim == "launch.cli":
        process.kill()
    else:
        os.kill(processes(tmp_path, victim)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == (-9 if victim == "launch.cli" else 137)
    end = time.monotonic() + 60
    while ranks_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert ranks_of(tmp_path) == []
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "preempted", errors
    assert (tmp_path / "checkpoints" / f"step_{status['step']:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2], ids=lambda n: n.name)
def test_torchrun_passes_a_user_signal_on_and_a_second_one_changes_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = dist_train_run(tmp_path, "train.steps=1000000", "eval.every_epochs=null")
    wait_for_lines(process, tmp_path, 3)
    for again in (number, signal.SIGTERM):  # to torchrun itself, as SLURM signals every process
        os.kill(processes(tmp_path, "dist_train.agent")[0], again)
        time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert f"({number.name} on rank" in out
    assert "Traceback" not in errors
    assert ranks_of(tmp_path) == []
