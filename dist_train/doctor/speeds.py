"""What torch measures, as records that need no torch to be read and judged."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What one rank reaches while all others are at it too."""

    rank: int
    matmul_flops_per_sec: float
    copied_bytes_per_sec: float
    core_share: float  # of its threads' cores' time that it got for the matmul; 1.0 on a GPU
    copy_core_share: float
    num_threads: int
    throttled_periods: int  # of the cgroup's quota, meanwhile
    periods: int
    megahertz: float  # 0: not told by this machine
    megahertz_most: float
    device: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """One all-reduce over all ranks."""

    num_bytes: int
    sec: float  # median

    def bus_bytes_per_sec(self, world_size: int) -> float:
        """Return what each rank's link carries, as nccl-tests count it."""
        return self.num_bytes / self.sec * 2 * (world_size - 1) / world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two nodes that exchange messages, both directions at once."""

    nodes: list[str]  # two
    latency_sec: float
    bytes_per_sec: float  # of each direction


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What one rank has measured of the collectives."""

    backend: str
    init_sec: float
    reductions: list[Reduction] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    transports: dict[str, int] = field(default_factory=dict)  # of NCCL: "NET/IB": channels
    link_bytes_per_sec: float | None = None  # of the interface to the other nodes; None: unknown
    link: str = ""  # its name, or why the speed is unknown
    error: str = ""  # what stopped it
    stage: str = ""  # where
