"""The job that every peer does: the same network, batches, learning rates and number of steps."""

import hashlib
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

EPOCH = 97  # steps; prime, so that no peer's own period falls on its ends
SETTLED = 10  # steps, after which what the fastest loop has made is there to stay
PEAK_LR = 0.0625  # a power of two: peak * (1 - x) and peak - peak * x have the same bits
NUM_CLASSES = 10


@dataclass(frozen=True, slots=True)
class Case:
    """A network, the pictures of one rank's step, and the turns in which its steps are measured."""

    factory: str
    batch_size: int  # of one rank
    epochs: int
    first: int  # step: what comes before is not measured
    turns: int
    turn: int  # steps

    @property
    def last(self) -> int:
        """Return the step at whose start the last turn ends."""
        return self.first + self.turns * self.turn


CASES = {  # a turn of the tiny net is an epoch, so that what a peer does at its end counts
    "tiny": Case("benchmarks.peers.job:tiny_net", 16, epochs=22, first=194, turns=19, turn=EPOCH),
    "resnet9": Case(
        "benchmarks.peers.job:small_resnet9", 128, epochs=1, first=SETTLED, turns=10, turn=8
    ),
}


def tiny_net(num_classes: int = NUM_CLASSES) -> nn.Module:
    """Two strided convolutions: about a millisecond a step, so that a loop's own cost shows."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, num_classes),
    )


def small_resnet9(num_classes: int = NUM_CLASSES) -> nn.Module:
    """ResNet-9 of width 16."""
    from dist_train.models.resnet9 import resnet9

    torch.manual_seed(0)
    return resnet9(num_classes, width=16)


@dataclass(frozen=True, slots=True)
class Clocks:
    """The time of day and what this process and its children have cost, in seconds of CPU time."""

    wall_sec: float
    cpu_sec: float
    children_sec: float


@dataclass(slots=True)
class Job:
    """What one process of a peer is to do, and the clocks it does it under."""

    case: Case
    rank: int
    world_size: int
    precision: str  # fp32 | bf16
    lean: bool  # no log, progress bar or checkpoint; else what the peer does by default
    folder: Path
    wait_for_turn: Callable[[], None] = lambda: None
    waited_sec: float = 0.0  # for turns
    asked: int = 0  # batches handed out so far
    first_step_ended: float = 0.0  # time of day: when the second batch was asked for
    turns: list[tuple[Clocks, Clocks]] = field(default_factory=list)  # at both ends of each
    children_mib: float = 0.0  # their peak memory
    throw_away_sec: float = 0.0  # of the start, for a step that is not one of the job's

    @property
    def total_steps(self) -> int:
        return self.epochs * EPOCH

    @property
    def epochs(self) -> int:
        return self.case.epochs

    def model(self) -> nn.Module:
        """Return the network, its weights the same for every peer."""
        make = {"tiny_net": tiny_net, "small_resnet9": small_resnet9}
        name = self.case.factory.partition(":")[2]
        return make[name]().to(memory_format=torch.channels_last)

    def optimizer(self, model: nn.Module, *, fused: bool = True) -> torch.optim.SGD:
        """Return the optimizer that every peer is given."""
        return torch.optim.SGD(
            model.parameters(),
            lr=PEAK_LR,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            fused=fused,
        )

    def factor(self, step: int) -> float:
        """Return the learning rate of `step` as a share of the peak."""
        return 1 - step / self.total_steps

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Return the learning rate as the scheduler object that the peers ask for."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)

    def start_group(self) -> None:
        """Join the other ranks."""
        if self.world_size > 1:
            torch.distributed.init_process_group("gloo")


class Batches:
    """An epoch of ready-made batches in memory; notes the clocks where a turn ends and begins."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begun: Clocks | None = None
        count = 8  # different ones, in turn: they stay in the cache, whoever trains on them
        generator = torch.Generator().manual_seed(1 + job.rank)
        shape = (job.case.batch_size, 3, 32, 32)
        self._batches = [
            (
                torch.randn(shape, generator=generator).contiguous(
                    memory_format=torch.channels_last
                ),
                torch.randint(NUM_CLASSES, (job.case.batch_size,), generator=generator),
            )
            for _ in range(count)
        ]

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(EPOCH):
            yield self.take()

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: images (n, 3, 32, 32) float32, labels (n,) int64."""
        job = self._job
        if job.asked == 1:
            job.first_step_ended = time.time()
        since_first = job.asked - job.case.first
        if since_first % job.case.turn == 0 and 0 <= since_first <= job.case.last - job.case.first:
            self._take_turns()
        batch = self._batches[job.asked % len(self._batches)]
        job.asked += 1
        return batch

    def _take_turns(self) -> None:
        """End a turn, let the other peers have theirs, and begin the next.

        The children are looked at outside of it, as that takes a millisecond.
        """
        job = self._job
        wall_sec, cpu_sec = time.time(), time.process_time()
        if self._begun is not None:
            children_sec, job.children_mib = _children()
            job.turns.append((self._begun, Clocks(wall_sec, cpu_sec, children_sec)))
        job.wait_for_turn()
        job.waited_sec += time.time() - wall_sec
        children_sec, _ = _children()
        self._begun = Clocks(time.time(), time.process_time(), children_sec)


def measured(job: Job, weights: dict[str, Tensor], begun: float) -> dict[str, object]:
    """Return what one process has to say once it has trained.

    Args:
        job: with its clocks.
        weights: parameters and buffers at the end. Buffers are left out of digest and norm: a rank
            has running statistics of its own.
        begun: time.time() when the command was given.
    """
    steps = job.case.turns * job.case.turn
    wall, cpu, children = (
        sum(getattr(end, key) - getattr(begin, key) for begin, end in job.turns)
        for key in ("wall_sec", "cpu_sec", "children_sec")
    )
    first_step_sec = job.first_step_ended - begun
    peak_rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.device("meta"):  # for the names alone
        params = {name: weights[name].detach() for name, _ in job.model().named_parameters()}
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode() + params[name].contiguous().numpy().tobytes())
    return {
        "steps": job.asked,
        "cpu_us": 1e6 * (cpu + children) / steps,
        "children_us": 1e6 * children / steps,
        "images_per_sec": job.case.batch_size * job.world_size * steps / wall,
        "first_step_sec": first_step_sec,
        "throw_away_sec": job.throw_away_sec,
        "first_step_apart_sec": first_step_sec - job.throw_away_sec,
        "peak_rss_mib": peak_rss_mib + job.children_mib,
        "weights_sha256": digest.hexdigest(),
        "norm": float(sum(p.double().pow(2).sum() for p in params.values()) ** 0.5),
    }


def _children() -> tuple[float, float]:
    """Return what this process's children cost: CPU seconds, ended ones' too, and peak MiB."""
    ended = os.times()
    cpu_sec = ended.children_user + ended.children_system
    kib, own = 0, str(os.getpid())
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] != own:
                continue
            peak = re.search(r"VmHWM:\s+(\d+)", stat.with_name("status").read_text())
            # clock_getcpuclockid(3): /proc has hundredths of a second, and the watchdog needs less.
            cpu_sec += time.clock_gettime(~int(stat.parent.name) << 3 | 2)
        except OSError:
            continue  # it ended meanwhile
        cpu_sec += sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")  # what it waited for
        kib += int(peak[1]) if peak else 0
    return cpu_sec, kib / 1024
