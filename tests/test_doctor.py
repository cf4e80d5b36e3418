"""`dist-train doctor` as it measures and runs; what it decides is in test_doctor_findings.py."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from dist_train.doctor import meeting, slurm_settings
from dist_train.doctor.arrival import next_ports
from dist_train.doctor.board import Board
from dist_train.doctor.collectives import rounds, transports_in
from dist_train.doctor.deadline import DeadlineError, within
from dist_train.doctor.finding import listed, size_of, time_of
from dist_train.doctor.gpus import choice_of
from dist_train.doctor.link_speed import speed_in
from dist_train.doctor.machine import cores_in
from dist_train.doctor.main import main
from dist_train.doctor.stages import Stages
from dist_train.doctor.storage import kind_of
from dist_train.layout import Layout
from tests.doctor_facts import (
    arrival,
    machine,
)
from tests.ranks import free_port, run_ranks


def test_the_gpu_that_a_rank_takes() -> None:
    by_number = machine(1, env={"CUDA_VISIBLE_DEVICES": "2,3"})
    bound = machine(1, env={"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "3"})
    cases = (
        (by_number, arrival(1, gpus=["GPU-c", "GPU-d"]), "GPU-d"),
        (by_number, arrival(1), "3"),
        (bound, arrival(1), "3"),  # SLURM's count over the node, CUDA's over the task
        (machine(1, env={"SLURM_STEP_GPUS": "0-1"}), arrival(1), "1"),
        (machine(1, local_rank=3), arrival(1, gpus=["GPU-c", "GPU-d"]), "GPU-d"),  # two of its own
    )
    for one, came, name in cases:
        choice = choice_of(one, came, by_slurm=True)
        assert choice is not None
        assert choice.name == name
    assert choice_of(machine(0), arrival(0), by_slurm=True) is None


def test_everybody_meets_everybody_once() -> None:
    for count in range(1, 8):
        met = [frozenset(match) for one in rounds(list(range(count))) for match in one.items()]
        assert len(met) == len(set(met)) == count * (count - 1) // 2
        for one in rounds(list(range(count))):
            busy = [*one.keys(), *one.values()]
            assert len(busy) == len(set(busy))


def test_nccl_s_log() -> None:
    log = (
        "h:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read\n"
        "h:1:2 [0] NCCL INFO Channel 00/0 : 3[3] -> 4[0] [receive] via NET/IB/0/GDRDMA\n"
        "h:1:2 [0] NCCL INFO Channel 01/0 : 3[3] -> 4[0] [send] via NET/IB/0/GDRDMA\n"
    )
    assert transports_in(log) == {"P2P": 1, "NET/IB": 2}


def test_the_speed_of_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "eth0"
    folder.mkdir()
    for name, text in (("ifindex", "3\n"), ("speed", "25000\n")):
        (folder / name).write_text(text)
    assert speed_in(folder, 3) == (None, "eth0 is virtual")
    (folder / "device").mkdir()
    assert speed_in(folder, 3) == (25e9 / 8, "eth0")
    assert speed_in(folder, 4)[1].startswith("/sys shows the interfaces of another namespace")
    (folder / "speed").write_text("-1\n")
    assert speed_in(folder, 3) == (None, "eth0 does not tell its speed")


def test_what_linux_and_slurm_write_is_read(tmp_path: Path) -> None:
    assert cores_in("0-2,8\n") == [0, 1, 2, 8]
    mounts = (
        "22 1 0:20 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 0:44 / {tmp_path} rw shared:1 - nfs4 host:/x rw,vers=4.2,local_lock=all\n"
    )
    assert kind_of(tmp_path, mounts) == "nfs4 local_lock=all"
    assert slurm_settings.ask_scontrol({}).why_not == "this is no SLURM job"
    layout = Layout(launcher="slurm", world_size=2)
    ports = next_ports(layout, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"})
    assert len(set(ports)) == 3
    assert all(15_000 <= port < 30_000 for port in ports)


def test_numbers_and_names_are_told_shortly() -> None:
    assert (size_of(4), size_of(3 << 20), size_of(5 << 40)) == ("4 B", "3 MiB", "5 TiB")
    assert (time_of(2e-4), time_of(0.1), time_of(12.0)) == ("200 us", "100 ms", "12 s")
    assert listed(range(9)) == "0, 1, 2, 3, 4 and 4 more"


def test_work_that_never_returns_is_left_behind() -> None:
    with pytest.raises(DeadlineError, match="within 0 s"):
        within(0.05, lambda: time.sleep(2))
    assert within(5, lambda: 3) == 3


@pytest.mark.parametrize("way", ["folder", "store"])
def test_notes_come_through_either_way(way: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / ("notes" if way == "folder" else "file/notes")
    boards = [Board(place, rank) for rank in range(2)]
    assert [board.folder_error is None for board in boards] == [way == "folder"] * 2
    if way == "store":
        shared = HashStore()
        for board in boards:
            board.store = shared
    boards[0].post("word", {"a": [1]})
    boards[1].post("word", None)
    assert boards[1].collect("word", [0, 1], 5) == {0: {"a": [1]}, 1: None}
    assert boards[0].collect("word", [0, 1, 2], 0.1).keys() == {0, 1}


def test_a_rank_that_fails_in_a_stage_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    stages = Stages(Board(tmp_path, 0), 0)
    stages.crew = [0]

    def work(note: int) -> int:
        return 1 // note

    assert stages.run("one", work, seconds=5, note=0) == {}
    assert stages.run("two", work, seconds=5, note=1) == {0: 1}
    assert stages.run("three", lambda _: time.sleep(1), seconds=0.05) == {}
    assert stages.lost["one"][0].startswith("ZeroDivisionError")
    assert stages.lost["three"][0] == "no answer within 0 s"


def test_outcomes_of_a_probe() -> None:
    with meeting.listening("here") as port:
        found, connection = meeting.probe("127.0.0.1", port)
        assert connection is not None
        connection.close()
        assert found.outcome == "reached"
        peer = meeting.Peer(rank=1, node="localhost", port=port, address="")
        (seen,) = meeting.look_at_peers("me", [peer])
        assert (seen.outcome, seen.detail) == ("another answers", "here")
        assert seen.clock_ahead_sec is not None
        assert abs(seen.clock_ahead_sec) < 1
    assert meeting.probe("127.0.0.1", free_port())[0].outcome == "refused"
    assert meeting.probe("no-such-host.invalid", 80)[0].outcome == "no such host"


def test_a_port_that_takes_connections_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "RESOLVE_SEC", 1.0)
    monkeypatch.setattr(meeting, "CONNECT_SEC", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = meeting.Peer(
            rank=1, node="localhost", port=server.getsockname()[1], address="127.0.0.1"
        )
        (seen,) = meeting.look_at_peers("me", [peer])
    assert (seen.outcome, seen.detail) == ("timed out", "it connects but does not answer")


@pytest.mark.parametrize(
    "words", [["--nproc=0"], ["--wait=0"], ["--json=/no/such/folder/x"], ["x"]]
)
def test_a_mistake_is_one_line_and_code_2(words: list[str], capsys: Any) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("dist-train: error: ")
    assert told.count("\n") == 1


def examined(*words: str, folder: Path, json_file: Path) -> tuple[int, str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", "--quick", *words, f"--json={json_file}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    return done.returncode, done.stdout + done.stderr, json.loads(json_file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--nproc=2",)], ids=["one process", "two ranks"])
def test_this_machine_is_examined(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    code, text, told = examined(*words, folder=tmp_path / "here", json_file=tmp_path / "x.json")
    assert code == told["exit_code"], text
    assert re.search(r"^\d+ problems?, \d+ warnings?", text, re.M)
    ranks = len(words) + 1
    assert len(told["facts"]["machines"]) == len(told["facts"]["speeds"]) == ranks
    assert bool(told["facts"]["traffic"]) == (ranks > 1)
    assert told["facts"]["disk"]["neighbour_got_lock"] is False
    assert list((tmp_path / "here").iterdir()) == []  # nothing is left


def examine_here(folder: str) -> int:
    return main(["--quick", f"--run-dir={folder}", f"--json={folder}/x.json", "--wait=20"])


@pytest.mark.slow
def test_ranks_of_a_launcher(tmp_path: Path) -> None:
    codes = run_ranks(examine_here, 2, str(tmp_path))
    told = json.loads((tmp_path / "x.json").read_text())
    assert codes == [told["exit_code"], 0]
    assert told["facts"]["traffic"]["0"]["reductions"]
    assert {finding["level"] for finding in told["sections"][0]["findings"]} == {"ok"}


def leave_rank_1(folder: str) -> int | None:
    if os.environ["RANK"] == "1":
        return None
    return main([f"--run-dir={folder}", f"--json={folder}/x.json", "--wait=1", "--quick"])


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = run_ranks(leave_rank_1, 2, str(tmp_path))
    told = json.loads((tmp_path / "x.json").read_text())
    assert codes == [1, None]
    assert "rank 1 of 2 said nothing within 1 s" in told["sections"][0]["findings"][0]["text"]
