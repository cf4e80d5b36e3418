"""The real thing: torchrun starts ranks, restarts them after a kill, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import free_port, run_ranks
from tests.settings import SMALL, metrics, small
from tests.test_resume import HARD

REPOSITORY = Path(__file__).parents[1]


def trained(config: Any) -> dict[str, Any]:
    from dist_train.train import train

    return train(config)


def torchrun(*words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | (env or {})
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(run_dir: Path) -> list[int]:
    """Return the processes whose command line names the run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run_dir).encode() in line and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def torchrun_with(faults: list[dict[str, Any]], *words: str) -> tuple[str, str]:
    """Train under torchrun, one restart for each fault, to a good end; returns (output, errors)."""
    process = torchrun(
        "--nproc-per-node=2",
        f"--max-restarts={len(faults)}",
        "tests/torchrun_entry.py",
        *SMALL,
        *words,
        env={"TEST_FAULTS": json.dumps(faults)},
    )
    out, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert all(Path(str(fault["mark"])).exists() for fault in faults), "a fault never fired"
    return out, errors


@pytest.mark.slow
def test_max_restarts_ends_with_the_bits_of_an_unbroken_run(tmp_path: Path) -> None:
    clean = run_ranks(trained, 2, small(tmp_path / "clean", *HARD))[0]
    folder = tmp_path / "run"
    faults = [
        {"rank": 1, "step": 13, "place": "after the backward", "mark": str(tmp_path / "f0")},
        {"rank": 0, "step": 30, "place": "in the save", "mark": str(tmp_path / "f1")},
        {"rank": 1, "step": 44, "place": "before the step", "mark": str(tmp_path / "f2")},
    ]
    torchrun_with(faults, *HARD, f"run_dir={folder}")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == clean["weights_sha256"]
    assert summary["attempt"] == 3
    steps = [m["step"] for m in metrics(folder)]
    assert steps == [m["step"] for m in metrics(tmp_path / "clean")]
    assert ranks_of(folder) == []


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_at_a_step_and_the_same_command_continues(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--nproc-per-node=2", "-m", "dist_train", *SMALL, f"run_dir={folder}", "log_every=1"]
    process = torchrun(*words, "train.steps=1000000", "eval.every_epochs=null")
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 0)
    assert status["reason"].startswith("SIGTERM on rank")
    newest = max((folder / "checkpoints").iterdir())
    assert newest.name == f"step_{status['step']:08d}", "steps were lost"
    assert ranks_of(folder) == []
    more = status["step"] + 5
    again = torchrun(*words, f"train.steps={more}", "eval.every_epochs=null")
    out, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"resumed from {newest} at step {status['step']}" in out
    assert [m["step"] for m in metrics(folder) if "train/loss" in m] == list(range(1, more + 1))


@pytest.mark.slow
def test_dist_train_run_answers_with_the_code_of_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "run", "--nproc", "2", *SMALL]
    words = [f"run_dir={tmp_path}", "train.steps=1000000", "log_every=1"]
    process = subprocess.Popen(
        [*command, *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "metrics.jsonl").exists() or len(metrics(tmp_path)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, "preempted and saved is 0, whatever torchrun says"
    assert "the same command continues" in out
    assert ranks_of(tmp_path) == []


@pytest.mark.slow
def test_two_torchruns_that_meet_at_an_endpoint_are_one_run(tmp_path: Path) -> None:
    clean = run_ranks(trained, 2, small(tmp_path / "clean", *HARD))[0]
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = []
    for _ in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc-per-node=1", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1", "-m", "dist_train"]
        command += [*SMALL, *HARD, f"run_dir={tmp_path / 'run'}"]
        nodes.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )
    ends = [node.communicate(timeout=200) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["weights_sha256"] == clean["weights_sha256"]
    assert sum("run folder:" in out for out, _ in ends) == 1, "both machines spoke"


@pytest.mark.slow
def test_a_rank_with_loader_workers_saves_on_sigterm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--nproc-per-node=2", "-m", "dist_train", *SMALL, f"run_dir={folder}", "log_every=1"]
    words += ["data.loader=workers", "data.num_workers=1", "data.image_size=12"]
    process = torchrun(*words, "train.steps=1000000", "eval.every_epochs=null")
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # torchrun signals every process of a rank
    out, errors = process.communicate(timeout=120)
    assert "and saved: the same command continues" in out, errors
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 0)
    assert ranks_of(folder) == []


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_and_stop(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--nproc-per-node=2", "-m", "dist_train", *SMALL, f"run_dir={folder}", "log_every=1"]
    process = torchrun(*words, "train.steps=1000000", "eval.every_epochs=null")
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 5:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    out, _ = process.communicate(timeout=120)  # ends when the last rank has
    assert "torchrun died on rank" in out
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    while ranks_of(folder):
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_one_of_two_torchruns_is_killed_and_started_again(rank: int, tmp_path: Path) -> None:
    """Its death is no wish to stop: the other one's ranks are started again, and meet the new."""
    folder, port = tmp_path / "run", free_port()
    words = (*HARD, "train.steps=60", "log_every=1", "model.factory=tests.nets:paced_net")
    clean = run_ranks(trained, 2, small(tmp_path / "clean", *words, "model.args.sec=0.0"))[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--max-restarts=3"]
    command += ["--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=one"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}"]
    words = ("-m", "dist_train", *SMALL, *words, "model.args.sec=0.1", f"run_dir={folder}")
    # torchrun orders them by their addresses.
    kept = [*command, f"--local-addr=127.0.0.{3 - 2 * rank}", *words]
    killed = [*command, "--local-addr=127.0.0.2", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(kept, cwd=REPOSITORY, **pipes)
    end = time.monotonic() + 60
    while not serves(port):  # it has the store of both
        assert time.monotonic() < end, "nobody listens"
        time.sleep(0.1)
    second = subprocess.Popen(killed, cwd=REPOSITORY, **pipes)
    end = time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 10:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < end, "no step was taken"
        time.sleep(0.1)
    second.kill()
    second.communicate(timeout=60)  # ends when its rank has saved
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert f"rank {rank} lost its launcher (torchrun died), after step" in status["reason"]
    assert (folder / "checkpoints" / f"step_{status['step']:08d}").is_dir(), "steps were lost"
    second = subprocess.Popen(killed, cwd=REPOSITORY, **pipes)
    ends = [process.communicate(timeout=200)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], ends
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_sha256"] == clean["weights_sha256"]
    steps = [line["step"] for line in metrics(folder) if "train/loss" in line]
    assert steps == list(range(1, 61)), "no step is lost or repeated"


def serves(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_node_that_joins_costs_no_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    elastic += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-conf=last_call_timeout=1"]
    words = ["model.factory=tests.nets:paced_net", "model.args.sec=0.1", "train.steps=150"]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, "-m", "dist_train"]
    command += [*SMALL, *words, "log_every=1", f"run_dir={folder}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
    end = time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 5:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < end, "no step was taken"
        time.sleep(0.1)
    second = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
    while json.loads((folder / "status.json").read_text())["state"] == "running":
        assert time.monotonic() < end, "the ranks train on"
        time.sleep(0.1)
    for process in (first, second):  # what torchrun makes of it is its own affair: 60 s, or more
        process.kill()
    text, _ = (process.communicate()[0] for process in (first, second))
    assert "torchrun may change the number of nodes (--nnodes=1:2)" in text
    assert "and saved: the same command continues" in text
    again = subprocess.run(command, cwd=REPOSITORY, timeout=200, check=False, **pipes)
    assert again.returncode == 0, again.stdout
    steps = [line["step"] for line in metrics(folder) if "train/loss" in line]
    assert steps == list(range(1, 151)), "no step is lost or repeated"
