"""What a rank sees of its machine: software, cores, memory, limits. Imports no torch."""

import hashlib
import os
import platform
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import dist_train
from dist_train.cgroups import cgroup_folders, memory_limit_bytes, quota_cores, text_of
from dist_train.layout import Layout

# Variables that say how ranks, cores, GPUs and networks were dealt out; no others are read.
TOLD = re.compile(
    r"(SLURM_(STEP_GPUS|JOB_GPUS|GPUS_ON_NODE|GPUS_PER_TASK|GPU_BIND|CPUS_PER_TASK|NTASKS_PER_NODE|"
    r"CPU_BIND\w*|NTASKS|NNODES)|SLURMD_TRES_BIND|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|(NCCL|GLOO)_\w+)"
)
LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "nproc": resource.RLIMIT_NPROC,
    "memlock": resource.RLIMIT_MEMLOCK,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One rank's view of the machine that it runs on."""

    rank: int
    local_rank: int
    local_world_size: int
    node: str  # the name that SLURM and the other nodes use
    host: str
    pid: int
    python: str
    version: str  # of dist_train
    source_sha256: str  # of dist_train's files
    cpu_model: str
    cores: list[int]  # that this process may run on
    num_cores: int  # of the machine
    numa_nodes: list[list[int]]  # the cores of each
    quota_cores: float | None  # what the cgroup allows; None: no quota
    memory_limit_bytes: int | None  # of the cgroup; None: no limit
    memory_left_bytes: int
    load: float  # processes that want a core, mean of the last minute
    limits: dict[str, int]  # soft; -1: none
    shm_bytes: int  # 0: no /dev/shm
    shm_free_bytes: int
    infiniband: list[str]  # "mlx5_0/1: ACTIVE, 100 Gb/sec (4X EDR)"
    driver: str  # of NVIDIA's GPUs; "": none
    env: dict[str, str]


def look(layout: Layout, env: Mapping[str, str]) -> Machine:
    """Read what this machine says of itself (Linux)."""
    host = socket.gethostname()
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    limit = memory_limit_bytes()
    return Machine(
        rank=layout.rank,
        local_rank=layout.local_rank,
        local_world_size=layout.local_world_size,
        node=env.get("SLURMD_NODENAME", host) if layout.launcher == "slurm" else host,
        host=host,
        pid=os.getpid(),
        python=platform.python_version(),
        version=dist_train.__version__,
        source_sha256=_source_sha256(Path(dist_train.__file__).parent),
        cpu_model=_cpu_field("model name") or platform.machine(),
        cores=sorted(os.sched_getaffinity(0)),
        num_cores=os.cpu_count() or 1,
        numa_nodes=_numa_nodes(),
        quota_cores=quota_cores(),
        memory_limit_bytes=limit,
        memory_left_bytes=_memory_left(limit),
        load=os.getloadavg()[0],
        limits={name: resource.getrlimit(number)[0] for name, number in LIMITS.items()},
        shm_bytes=shm.f_blocks * shm.f_frsize if shm else 0,
        shm_free_bytes=shm.f_bavail * shm.f_frsize if shm else 0,
        infiniband=_infiniband(),
        driver=_driver(),
        env={name: value for name, value in env.items() if TOLD.fullmatch(name)},
    )


def megahertz(cores: list[int]) -> tuple[float, float]:
    """Return the highest frequency of these cores now, and the highest they can have; 0: unknown.

    Virtual machines often tell neither.
    """
    now = [float(v) for v in re.findall(r"^cpu MHz\s*: ([\d.]+)", text_of("/proc/cpuinfo"), re.M)]
    folder = "/sys/devices/system/cpu/cpu{}/cpufreq/cpuinfo_max_freq"
    most = [text_of(folder.format(core)).strip() for core in cores]
    mine = [now[core] for core in cores if core < len(now)]
    return max(mine, default=0.0), max((int(k) / 1000 for k in most if k.isdigit()), default=0.0)


def throttled() -> tuple[int, int]:
    """Return in how many periods the cgroup's quota ran out, and how many there were."""
    for folder in cgroup_folders("cpu"):
        found = dict(re.findall(r"^(nr_\w+) (\d+)", text_of(folder / "cpu.stat"), re.M))
        if int(found.get("nr_periods", 0)):
            return int(found.get("nr_throttled", 0)), int(found["nr_periods"])
    return 0, 0


def _memory_left(limit: int | None) -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text_of("/proc/meminfo"), re.M)
    left = int(found[1]) * 1024 if found else 0
    return min(left, limit) if limit is not None else left


def _numa_nodes() -> list[list[int]]:
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"))
    found = [cores_in(text_of(path)) for path in nodes]
    return [cores for cores in found if cores]


def cores_in(text: str) -> list[int]:
    """Read Linux's list of cores, such as `0-3,8`."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return [core for r in ranges for core in range(int(r[0]), int(r[-1]) + 1)]


def _infiniband() -> list[str]:
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    return [
        f"{port.parts[-3]}/{port.name}: {text_of(port / 'state').split(':')[-1].strip()}, "
        f"{text_of(port / 'rate').strip()}"
        for port in ports
    ]


def _driver() -> str:
    found = re.search(r"Kernel Module\D*?([\d.]+)", text_of("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _cpu_field(name: str) -> str:
    found = re.search(rf"^{name}\s*: (.*)$", text_of("/proc/cpuinfo"), re.M)
    return found[1].strip() if found else ""


def _source_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
