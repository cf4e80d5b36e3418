"""What the doctor decides: sound facts have no problem, and each spoilt one is named."""

import errno
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from dist_train.doctor.diagnosis import diagnose
from dist_train.doctor.finding import Finding
from dist_train.doctor.report import as_json, as_text, exit_code_of
from dist_train.doctor.slurm_settings import Settings
from tests.doctor_facts import (
    DISK,
    GIB,
    SOUND,
    arrival,
    link,
    links,
    machine,
    pair,
    speed,
    traffic,
    view,
    with_arrivals,
    with_machines,
    with_speeds,
)

FAR = {"latency_sec": 0.1, "bytes_per_sec": 1e7}
TO_NODE2 = [
    link(a, "node2", outcome="no such host", address="", by_address="reached")
    for a in ("node1", "node3")
]
REQUEUE = {"KillWait": "30 sec", "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
BOUND = {"SLURM_STEP_GPUS": "0", "SLURMD_TRES_BIND": "gpu:map_gpu:0,0"}
GPU0 = {"CUDA_VISIBLE_DEVICES": "0"}
ALL_GPUS = {r: arrival(r, gpus=["GPU-a", "GPU-b"]) for r in range(6)}

# What is spoilt, the level of the finding, and what its sentence says.
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a rank that says nothing": (
        {"machines": SOUND.machines[:5], "arrivals": {r: arrival(r) for r in range(5)}},
        "error",
        r"rank 5 of 6 said nothing within 60 s.*node1:17123",
    ),
    "a rank that is not ready": (
        {"arrivals": {r: arrival(r) for r in range(5)}},
        "error",
        r"rank 5 on node3 started, but was not ready within 60 s",
    ),
    "rank 0's port is blocked": (
        with_arrivals(2, 3, store="timed out", store_address="10.0.0.11"),
        "error",
        r"ranks 2 and 3 on node2 started, but cannot reach rank 0 at node1:17123 \(10.0.0.11\): no "
        r"answer: a firewall drops it",
    ),
    "rank 0's port is refused": (
        with_arrivals(2, store="refused"),
        "error",
        r"rank 2 on node2 .*: refused: a firewall rejects it",
    ),
    "rank 0's name": (
        with_arrivals(4, 5, store="no such host"),
        "error",
        r"ranks 4 and 5 on node3 .* node1:17123: the name does not resolve there",
    ),
    "rank 0's port is taken": (
        with_arrivals(0, store="taken"),
        "error",
        r"rank 0 on node1 started, but cannot listen at node1:17123: another process has it",
    ),
    "a rank lost on the way": (
        {"lost": {"the all-reduce": {3: "no word came"}}},
        "error",
        r"rank 3 failed in the all-reduce \(no word came\)",
    ),
    "a name that no other node resolves": (
        {"links": links(*TO_NODE2)},
        "error",
        r"node1 and node3 cannot find node2, though its address can be reached: the name does not",
    ),
    "a node that resolves no other": (
        {"links": links(*[link("node3", b, outcome="no such host") for b in ("node1", "node2")])},
        "error",
        r"node3 cannot find node1 and node2: the name does not resolve there",
    ),
    "one direction blocked": (
        {"links": links(link("node2", "node3", outcome="timed out", address="10.0.0.13"))},
        "error",
        r"node2 cannot connect to node3 \(10.0.0.13\), though the other direction is open: no",
    ),
    "a name that leads to itself": (
        {"links": links(link("node1", "node2", address="127.0.1.1"))},
        "error",
        r"node1 resolves node2's name to 127.0.1.1, which is node1 itself",
    ),
    "another machine": (
        {"links": links(link("node1", "node2", outcome="another answers", detail="node9"))},
        "error",
        r"node1 cannot connect to node2 \(10.0.0.12, node9\).*another machine answers",
    ),
    "an own name of Debian's": (
        with_arrivals(4, 5, own_addresses=["127.0.1.1"]),
        "note",
        r"the own name of node3 leads to 127.0.1.1",
    ),
    "a port that is taken": (
        with_arrivals(0, taken_ports=[18000]),
        "warning",
        r"port 18000 of node1, which later steps",
    ),
    "a port of outgoing connections": (
        {"ephemeral_ports": (10000, 60999)},
        "warning",
        r"port 17123 may be taken by any outgoing connection \(10000 to 60999\)",
    ),
    "a clock five minutes ahead": (
        {"links": links(*[link(a, "node3", clock_ahead_sec=300.0) for a in ("node1", "node2")])},
        "error",
        r"node3's clock is 300 s ahead of the median of the nodes: have chrony",
    ),
    "a clock two seconds behind": (
        {"links": links(*[link(a, "node2", clock_ahead_sec=-2.0) for a in ("node1", "node3")])},
        "warning",
        r"node2's clock is 2 s behind the median",
    ),
    "a clock asked too slowly": (
        {"links": [link(a, b, round_trip_sec=2.0) for a, b in (("node1", "node2"),)]},
        "not checked",
        r"the clock of node1, node2 and node3: it could not be asked, or too slowly",
    ),
    "another torch": (
        with_arrivals(4, 5, torch="2.11.0"),
        "error",
        r"torch is 2.15.0 on most nodes, 2.11.0 on node3: give every node the same",
    ),
    "other files": (
        with_machines(2, 3, source_sha256="cd" * 32),
        "error",
        r"dist_train is 0.1.0 \(files abababab\) on most nodes, 0.1.0 \(files cdcdcdcd\) on node2",
    ),
    "another driver": (
        with_machines(0, 1, driver="550.1"),
        "warning",
        r"driver is none on most nodes, 550.1 on node1",
    ),
    "another CPU": (with_machines(0, 1, cpu_model="Xeon"), "note", r"CPU is EPYC .* Xeon on node1"),
    "a broken torch": (
        with_arrivals(2, torch_error="ImportError: libcudart.so"),
        "error",
        r"torch cannot be imported on node2 \(ImportError: libcudart.so\)",
    ),
    "a slow environment": (
        with_arrivals(4, 5, import_sec=90.0),
        "note",
        r"importing torch took 90 s on node3, 3 s in the median",
    ),
    "two ranks on one GPU, by torch": (
        {"arrivals": ALL_GPUS | {3: arrival(3, gpus=["GPU-b", "GPU-a"])}},
        "error",
        r"local ranks 0 and 1 on node2 are on one GPU \(GPU-a\): give --gpus-per-node=2",
    ),
    "two ranks on one GPU, by SLURM": (
        with_machines(*range(6), env=GPU0 | BOUND),
        "error",
        r"local ranks 0 and 1 on node1, node2 and node3 are by SLURM's binding on one GPU \(0\): "
        r"leave out --gpu-bind=map_gpu:0,0 and give --gpus-per-node=2",
    ),
    "two ranks with one number of SLURM's GPUs": (
        with_machines(*range(6), env=GPU0 | {"SLURM_STEP_GPUS": "0,1"}),
        "error",
        r"local ranks 0 and 1 on .* are by SLURM's binding on one GPU \(0 of 0,1\): give --gpus-per"
        r"-node=2 with --ntasks-per-node=2, and do not set CUDA_VISIBLE_DEVICES yourself",
    ),
    "two ranks with one number": (
        with_machines(*range(6), env=GPU0),
        "warning",
        r"local ranks 0 and 1 on .* all have CUDA_VISIBLE_DEVICES=0, which is one GPU unless",
    ),
    "more ranks than GPUs": (
        {"arrivals": ALL_GPUS, "layout": replace(SOUND.layout, launcher="torchrun")}
        | with_machines(5, local_rank=2),
        "error",
        r"local rank 2 on node3 can take 2 GPUs, so it has none of",
    ),
    "two ranks and one GPU": (
        {"arrivals": {r: arrival(r, gpus=["GPU-a"]) for r in range(6)}}
        | {"layout": replace(SOUND.layout, launcher="torchrun")},
        "error",
        r"local ranks 0 and 1 on node1, node2 and node3 are on one GPU \(GPU-a\): start one rank "
        r"for each GPU \(--nproc-per-node\)",
    ),
    "a node without GPUs": (
        {"arrivals": ALL_GPUS | {4: arrival(4), 5: arrival(5)}},
        "error",
        r"ranks 4 and 5 on node3 see no GPU while others do",
    ),
    "one core for each rank": (
        {"machines": [machine(r, cores=[r % 2]) for r in range(6)]},
        "warning",
        r"each rank on node1, node2 and node3 has 1 of the machine's 8 cores: give srun",
    ),
    "all on core 0": (
        with_machines(2, 3, cores=[0]),
        "error",
        r"ranks 2 and 3 on node2 share core 0 of 8",
    ),
    "a quota": (
        with_machines(4, 5, quota_cores=0.5),
        "warning",
        r"a cgroup's quota gives the 2 ranks on node3 0.5 cores together",
    ),
    "too many threads": (
        with_machines(0, 1, env={"OMP_NUM_THREADS": "8"}),
        "warning",
        r"OMP_NUM_THREADS=8 on node1, where a rank has 4 cores",
    ),
    "little memory": (
        with_machines(0, 1, memory_left_bytes=GIB, memory_limit_bytes=2 * GIB),
        "warning",
        r"512 MiB of memory are left for each rank on node1 \(the job's limit is 2 GiB\)",
    ),
    "few files": (
        with_machines(2, 3, limits={"nofile": 1024, "nproc": -1, "memlock": -1}),
        "note",
        r"a process on node2 may open 1024 files",
    ),
    "locked memory": (
        with_machines(
            2,
            3,
            infiniband=["mlx5_0/1: ACTIVE, 100 Gb/sec"],
            limits={"nofile": -1, "nproc": -1, "memlock": 65536},
        ),
        "error",
        r"InfiniBand is on node2, but a process may lock only 64 KiB",
    ),
    "Docker's /dev/shm": (
        with_machines(2, 3, shm_bytes=64 << 20, shm_free_bytes=64 << 20),
        "warning",
        r"/dev/shm on node2 has 64 MiB free",
    ),
    "a throttled node": (
        with_speeds(4, 5, matmul_flops_per_sec=10e9, throttled_periods=19, periods=20)
        | with_machines(4, 5, quota_cores=0.4),
        "error",
        r"node3 computes at 20% of the others' speed: its cgroup's quota of 0.4 cores ran out in "
        r"95% of the periods",
    ),
    "a busy node": (
        with_speeds(4, 5, matmul_flops_per_sec=30e9, core_share=0.5),
        "warning",
        r"node3 computes at 60% of the others' speed: it got 50% of its cores' time \(load 0.1",
    ),
    "a cold node": (
        with_speeds(4, 5, matmul_flops_per_sec=20e9, megahertz=800.0, megahertz_most=3000.0),
        "error",
        r"node3 computes at 40% .* its cores run at 800 of 3000 MHz",
    ),
    "a slow rank": (
        with_speeds(3, matmul_flops_per_sec=20e9),
        "error",
        r"rank 3 on node2 computes at 40% of the others' speed: it has its cores to itself",
    ),
    "slow memory": (
        with_speeds(2, 3, copied_bytes_per_sec=1e9),
        "error",
        r"node2 copies memory at 20% of the others' speed",
    ),
    "chance, where all lack cores": (
        {
            "speeds": with_speeds(*range(6), core_share=0.5)["speeds"]
            | {r: speed(r, matmul_flops_per_sec=20e9, core_share=0.2) for r in (4, 5)}
        },
        "warning",
        r"ranks 0, 1, 2, 3, 4 and 5 got 20% of the cores' time",
    ),
    "all starved": (
        with_speeds(*range(6), core_share=0.4),
        "warning",
        r"ranks 0, 1, 2, 3, 4 and 5 got 40% of the cores' time",
    ),
    "a far node": (
        {
            "traffic": traffic(
                [
                    pair("node1", "node2"),
                    pair("node1", "node3", **FAR),
                    pair("node2", "node3", **FAR),
                ]
            )
        },
        "error",
        r"a message between node3 and any other node takes 100 ms, one between other nodes 200 us",
    ),
    "a thin pair": (
        {
            "traffic": traffic(
                [
                    pair("node1", "node2"),
                    pair("node1", "node3"),
                    pair("node2", "node3", bytes_per_sec=2e8),
                ]
            )
        },
        "warning",
        r"191 MiB/s go between node2 and node3, 954 MiB/s between other nodes: look at the switch",
    ),
    "a far network": (
        {"traffic": traffic([pair("node1", "node2", **FAR)])},
        "error",
        r"a message between nodes takes 100 ms or more, well below 1 ms in a cluster's",
    ),
    "a link half used": (
        {"traffic": traffic(link_bytes_per_sec=12.5e9)},
        "warning",
        r"node1 and node2 exchange 954 MiB/s, and the link of eth0 has 11.6 GiB/s",
    ),
    "a collective that fails": (
        {"traffic": traffic(error="Connection reset", stage="the all-reduce")},
        "error",
        r"rank 0 failed in the all-reduce with gloo \(Connection reset\)",
    ),
    "no group": (
        {"traffic": {}, "why_no_traffic": "ranks are missing"},
        "not checked",
        r"all-reduce and messages between nodes: ranks are missing",
    ),
    "InfiniBand that is not used": (
        {"traffic": traffic(backend="nccl", transports={"NET/Socket": 4, "P2P": 4})}
        | with_machines(*range(6), infiniband=["mlx5_0/1: ACTIVE, 100 Gb/sec"]),
        "error",
        r"NCCL goes over TCP although every node has InfiniBand",
    ),
    "GPUs without P2P": (
        {"traffic": traffic(backend="nccl", transports={"SHM": 4, "NET/IB": 4})},
        "warning",
        r"GPUs of one node do not reach each other directly",
    ),
    "an InfiniBand port that is down": (
        with_machines(0, 1, infiniband=["mlx5_0/1: DOWN, 10 Gb/sec"]),
        "warning",
        r"InfiniBand port mlx5_0/1: DOWN, 10 Gb/sec of node1 is not active",
    ),
    "a full disk": (
        {"disk": replace(DISK, error="No space left", errno=errno.ENOSPC, free_bytes=0)},
        "error",
        r"the disk of /shared/runs is full \(No space left: 0 B free of 1e\+03 GiB",
    ),
    "a disk too small for the checkpoints": (
        {"disk": replace(DISK, free_bytes=2 * GIB)},
        "error",
        r"/shared/runs has 2 GiB free .* and 4 checkpoints of 1 GiB need 4 GiB",
    ),
    "a read-only folder": (
        {"disk": replace(DISK, error="Read-only file system", errno=errno.EROFS)},
        "error",
        r"/shared/runs cannot be written to \(Read-only file system\)",
    ),
    "locks that exclude nobody": (
        {"disk": replace(DISK, neighbour_got_lock=True)},
        "error",
        r"a lock in /shared/runs does not keep out another process of the same node, so that two",
    ),
    "locks of one node": (
        {"views": [view(0), view(2, got_lock=True), view(4, got_lock=True)]},
        "error",
        r"a lock in /shared/runs does not keep out node2 and node3",
    ),
    "refused locks": (
        {"disk": replace(DISK, lock_error="No locks available")},
        "error",
        r"/shared/runs refuses locks \(No locks available\)",
    ),
    "torn renames": (
        {"views": [view(0), view(2, gone=3), view(4)]},
        "error",
        r"node2 saw a file that is replaced by rename torn 0 and missing 3 times of 400",
    ),
    "a folder of its own": (
        {"views": [view(0), view(2, is_same=False), view(4)]},
        "warning",
        r"/shared/runs is another folder on node2",
    ),
    "a new file that is seen late": (
        {"views": [view(0), view(2), view(4, seen_after_sec=None)]},
        "warning",
        r"node3 did not see rank 0's new file for 10.0 s",
    ),
    "slow syncs": (
        {"disk": replace(DISK, sync_sec=0.5)},
        "warning",
        r"a sync of 4 KiB takes 500 ms in /shared/runs",
    ),
    "a folder that nobody can use": (
        {"disk": None, "folder_error": "Permission denied"},
        "error",
        r"rank 0's node cannot use the run folder \(Permission denied\)",
    ),
    "a short KillWait": (
        {"settings": Settings(cluster=REQUEUE | {"KillWait": "5 sec"})},
        "warning",
        r"a save gets 5 s \(KillWait\)",
    ),
    "preemption without the signal": (
        {"settings": Settings(cluster=REQUEUE)},
        "note",
        r"--signal is not sent on preemption, SIGTERM is",
    ),
    "preemption that cancels": (
        {"settings": Settings(cluster=REQUEUE, partition={"PreemptMode": "CANCEL"})},
        "warning",
        r"a preempted job is cancelled and not requeued",
    ),
    "preemption that suspends": (
        {"settings": Settings(cluster=REQUEUE | {"PreemptMode": "GANG,SUSPEND"})},
        "warning",
        r"a preempted job is suspended and keeps its GPU memory",
    ),
    "requeue forbidden": (
        {"settings": Settings(job={"Requeue": "0"})},
        "note",
        r"SLURM may not requeue this job",
    ),
    "time that runs out": (
        {"settings": Settings(left_sec=300.0)},
        "note",
        r"5 minutes are left of this job's time",
    ),
    "no scontrol": (
        {"settings": Settings(why_not="there is no scontrol here")},
        "not checked",
        r"SLURM's settings: there is no scontrol here",
    ),
}


def findings(**changes: Any) -> list[Finding]:
    sections = diagnose(replace(SOUND, **changes))
    return [finding for section in sections for finding in section.findings]


def test_sound_facts_have_neither_problems_nor_warnings() -> None:
    found = findings()
    assert {finding.level for finding in found} == {"ok", "note", "not checked"}
    assert exit_code_of(diagnose(SOUND)) == 0


@pytest.mark.parametrize("name", CASES)
def test_a_spoilt_fact_is_named(name: str) -> None:
    changes, level, pattern = CASES[name]
    found = findings(**changes)
    matching = [f for f in found if f.level == level and re.search(pattern, f.text)]
    assert len(matching) == 1, "\n".join(f"{f.level}: {f.text}" for f in found)
    worse = [f for f in found if f.level in ("warning", "error") and f not in matching]
    if level in ("warning", "error"):
        assert len(worse) == (name == "a throttled node"), worse  # its quota, too
    assert exit_code_of(diagnose(replace(SOUND, **changes))) == int(level == "error")


def test_every_finding_is_one_line_of_ascii() -> None:
    for changes, _, _ in CASES.values():
        for finding in findings(**changes):
            assert finding.text.isascii()
            assert "\n" not in finding.text
            assert len(finding.text) < 400


def test_the_report_tells_problems_again_at_its_end() -> None:
    facts = replace(SOUND, **with_speeds(3, matmul_flops_per_sec=20e9))
    sections = diagnose(facts)
    text = as_text(facts, sections)
    assert re.search(r"^1 problem, 0 warnings:\n  1\. error +rank 3 on node2 computes", text, re.M)
    told = json.loads(as_json(facts, sections))
    assert (told["schema"], told["exit_code"]) == (1, 1)
    assert told["facts"]["speeds"]["3"]["matmul_flops_per_sec"] == 20e9
