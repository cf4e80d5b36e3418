"""Facts of a sound cluster of three nodes with two ranks each, to be spoilt one at a time."""

from dataclasses import replace
from typing import Any

from dist_train.doctor.diagnosis import Facts
from dist_train.doctor.machine import Machine
from dist_train.doctor.meeting import Arrival, Link
from dist_train.doctor.slurm_settings import Settings
from dist_train.doctor.speeds import Pair, Reduction, Speed, Traffic
from dist_train.doctor.storage import Disk, View
from dist_train.layout import Layout

NODES = ("node1", "node2", "node3")
GIB = 1 << 30


def machine(rank: int, **changes: Any) -> Machine:
    first = Machine(
        rank=rank,
        local_rank=rank % 2,
        local_world_size=2,
        node=NODES[rank // 2],
        host=NODES[rank // 2],
        pid=100 + rank,
        python="3.12.1",
        version="0.1.0",
        source_sha256="ab" * 32,
        cpu_model="EPYC",
        cores=list(range(8)),
        num_cores=8,
        numa_nodes=[list(range(8))],
        quota_cores=None,
        memory_limit_bytes=None,
        memory_left_bytes=64 * GIB,
        load=0.1,
        limits={"nofile": 65536, "nproc": 65536, "memlock": -1},
        shm_bytes=32 * GIB,
        shm_free_bytes=32 * GIB,
        infiniband=[],
        driver="",
        env={},
    )
    return replace(first, **changes)


def arrival(rank: int, **changes: Any) -> Arrival:
    first = Arrival(
        rank=rank,
        import_sec=3.0,
        torch="2.15.0",
        cuda="13.2",
        nccl="2.30.7",
        gpus=[],
        store="reached",
        port=40000,
        own_addresses=[f"10.0.0.{11 + rank // 2}"],
        address=f"10.0.0.{11 + rank // 2}",
        taken_ports=[],
    )
    return replace(first, **changes)


def link(source: str, target: str, **changes: Any) -> Link:
    number = NODES.index(target) + 11
    first = Link(
        source=source,
        target=target,
        outcome="reached",
        address=f"10.0.0.{number}",
        round_trip_sec=0.0002,
        clock_ahead_sec=0.0,
    )
    return replace(first, **changes)


def links(*spoilt: Link) -> list[Link]:
    """Return a link for each direction; those given take the place of the sound ones."""
    other = {(one.source, one.target): one for one in spoilt}
    return [other.get((a, b), link(a, b)) for a in NODES for b in NODES if a != b]


def speed(rank: int, **changes: Any) -> Speed:
    first = Speed(
        rank=rank,
        matmul_flops_per_sec=50e9 + rank,
        copied_bytes_per_sec=5e9 + rank,
        core_share=1.0,
        copy_core_share=1.0,
        num_threads=4,
        throttled_periods=0,
        periods=0,
        megahertz=0.0,
        megahertz_most=0.0,
        device="cpu",
    )
    return replace(first, **changes)


def pair(a: str, b: str, **changes: Any) -> Pair:
    return replace(Pair(nodes=[a, b], latency_sec=0.0002, bytes_per_sec=1e9), **changes)


def traffic(pairs: list[Pair] | None = None, **changes: Any) -> dict[int, Traffic]:
    sound = [pair("node1", "node2"), pair("node1", "node3"), pair("node2", "node3")]
    first = Traffic(
        backend="gloo",
        init_sec=0.1,
        reductions=[Reduction(num_bytes=1 << 20, sec=0.002)],
        pairs=sound if pairs is None else pairs,
        link_bytes_per_sec=1.25e9,
        link="eth0",
    )
    return {0: replace(first, **changes)}


DISK = Disk(
    folder="/shared/runs",
    kind="nfs4",
    free_bytes=500 * GIB,
    total_bytes=1000 * GIB,
    free_files=10**6,
    num_files=10**7,
    checkpoint_bytes=GIB,
    written_bytes=64 << 20,
    write_sec=0.1,
    sync_sec=0.002,
    neighbour_got_lock=False,
)


def view(rank: int, **changes: Any) -> View:
    first = View(
        rank=rank,
        node=NODES[rank // 2],
        is_same=True,
        seen_after_sec=0.0,
        got_lock=None if rank == 0 else False,
        reads=400,
        read_bytes_per_sec=1e9,
    )
    return replace(first, **changes)


SOUND = Facts(
    layout=Layout(
        launcher="slurm",
        rule="SLURM step 7.0",
        world_size=6,
        master_addr="node1",
        master_port=17123,
    ),
    run_dir="/shared/runs",
    wait_sec=60.0,
    machines=[machine(rank) for rank in range(6)],
    arrivals={rank: arrival(rank) for rank in range(6)},
    links=links(),
    ephemeral_ports=(32768, 60999),
    disk=DISK,
    folder_error=None,
    views=[view(rank) for rank in (0, 2, 4)],
    speeds={rank: speed(rank) for rank in range(6)},
    traffic=traffic(),
    why_no_traffic="",
    settings=Settings(cluster={"KillWait": "30 sec", "PreemptType": "preempt/none"}),
    lost={},
    sec=10.0,
)


def with_machines(*ranks: int, **changes: Any) -> dict[str, Any]:
    """Return the change of the facts in which these ranks' machines are changed."""
    return {"machines": [machine(r, **changes if r in ranks else {}) for r in range(6)]}


def with_arrivals(*ranks: int, **changes: Any) -> dict[str, Any]:
    """Return the change of the facts in which these ranks arrive differently."""
    return {"arrivals": {r: arrival(r, **changes if r in ranks else {}) for r in range(6)}}


def with_speeds(*ranks: int, **changes: Any) -> dict[str, Any]:
    """Return the change of the facts in which these ranks are measured differently."""
    return {"speeds": {r: speed(r, **changes if r in ranks else {}) for r in range(6)}}
