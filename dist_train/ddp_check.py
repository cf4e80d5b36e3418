"""Does DDP sum right on these devices, and can a failure inside its step be taken back?

Tried out, since no list of releases can know it: a process group of its own, a toy network with a
bucket for each layer, and a failure on the first and on the last rank at each place. A thread does
it, so that a backend that hangs holds up nobody for long.
"""

import math
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.config import ConfigError
from dist_train.ddp import BucketGradients, wrapped
from dist_train.distributed import Ranks
from dist_train.gradients import backward
from dist_train.heartbeat import Pulse

DEADLINE_SEC, AFTERWARDS_SEC = 7.5, 1.0
GLOO_SEC = 3.0  # of one sum: its threads end by themselves, before the process may
FACTORS = (1.0, 2.0, 3.0)  # the layers' weights: small whole numbers, whose sums are exact
WIDTH = 32
BUCKET_MIB = 1e-4  # less than a layer
FORWARD, LATE = len(FACTORS), -1  # places of a failure; those between are the layers' backward


class _InjectedError(Exception):
    """The failure that is tried out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What was found, the same on all ranks."""

    sums: bool  # DDP sums right
    recovers: bool  # and a failure in the middle of a step can be taken back
    reason: str = ""  # why not, in words
    sec: float = 0.0


def try_ddp(ranks: Ranks, *, find_unused: bool) -> Found:
    """Find out what DDP does here; takes at most two seconds more than DEADLINE_SEC. Collective.

    Raises:
        ConfigError: it hangs, and a rank can compute no gradient any more; on all ranks.
    """
    import torch._dynamo  # noqa: F401 # DDP does, for a second or more: not on this clock

    start = time.monotonic()
    trial = _Trial(replace(ranks, pulse=Pulse()), find_unused=find_unused)
    thread = threading.Thread(target=trial.run, name="tries DDP", daemon=True)
    thread.start()
    thread.join(DEADLINE_SEC)
    if thread.is_alive():
        trial.problem = trial.problem or f"no answer in {DEADLINE_SEC:g} s, {trial.place}"
        threading.Thread(target=trial.abort, daemon=True).start()
        thread.join(AFTERWARDS_SEC)
    lost = thread.is_alive() and not _computes_gradients(ranks.device)
    everyone = ranks.gather((trial.sums, trial.problem, lost))
    problems = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(everyone) if text]
    if any(lost for _, _, lost in everyone):
        raise ConfigError(
            f"DDP was tried out and hangs ({problems[0]}), and so does whatever follows it in this "
            "process: set parallel.sync=flat, which does not try it"
        )
    return Found(
        sums=all(sums for sums, _, _ in everyone),
        recovers=not problems,
        reason=problems[0] if problems else "",
        sec=time.monotonic() - start,
    )


def _computes_gradients(device: torch.device) -> bool:
    """Say whether a backward still comes to its end: on a GPU one thread does all of them."""

    def work() -> None:
        x = torch.ones((), device=device, requires_grad=True)
        backward(x * x, torch.ones((), device=device))
        assert x.grad is not None
        x.grad.item()  # waits for the device

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(AFTERWARDS_SEC)
    return not thread.is_alive()


def _shares(world_size: int) -> list[float]:
    """Return what each rank's gradients are multiplied by."""
    return [float(rank % 7 + 1) for rank in range(world_size)]


class _Layers(nn.Module):
    """Multiplies by one weight after the other; fails where it is told to."""

    def __init__(self, device: torch.device, *, with_unused: bool) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.full((WIDTH,), factor, device=device)) for factor in FACTORS
        )
        if with_unused:
            self.unused = nn.Parameter(torch.zeros(WIDTH, device=device))
        self.fails_at: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = (x + 0).requires_grad_() * 1
        for place, weight in enumerate((None, *self.weights), LATE):
            x = x if weight is None else x * weight
            x.register_hook(lambda grad, place=place: self._pass(place, grad))
        self._pass(FORWARD, x)
        return x.sum()

    def _pass(self, place: int, value: Tensor) -> Tensor:
        if place == self.fails_at:
            raise _InjectedError
        return value


class _Trial:
    """One rank's part; its attributes are read by another thread."""

    def __init__(self, ranks: Ranks, *, find_unused: bool) -> None:
        self.sums = False
        self.problem = ""
        self.place = "at its start"
        self._ranks = ranks
        self._find_unused = find_unused
        self._group: dist.ProcessGroup | None = None

    def run(self) -> None:
        """Try everything. Collective."""
        try:
            if self._ranks.device.type == "cuda":
                torch.cuda.set_device(self._ranks.device)  # of this thread
            self._try()
        except Exception as error:  # whatever a backend or a private method that is gone raises
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            self.problem = self.problem or f"{text}, {self.place}"

    def abort(self) -> None:
        """Let go of what hangs in the group; gloo's own limit ends it there."""
        if self._group is not None and dist.get_backend(self._group) != "gloo":
            self._group.abort()

    def _try(self) -> None:
        limit = timedelta(seconds=GLOO_SEC) if dist.get_backend() == "gloo" else None
        group = dist.new_group(timeout=limit)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self.place = "in a first sum"  # it makes the connections, too: not inside a backward
        shares = _shares(self._ranks.world_size)
        first = torch.full((WIDTH,), shares[self._ranks.rank], device=self._ranks.device)
        dist.all_reduce(first, group=group)
        if not bool((first == sum(shares)).all()):
            self.problem = "a sum is wrong, before any of DDP"
        self.place = "without any failure"
        layers = _InDdp(self._ranks, group, find_unused=self._find_unused, recoverable=False)
        for _ in range(2):  # DDP makes its buckets anew after the first
            self._clean(layers)
        layers.close()
        self.sums = not self.problem
        for rank in sorted({0, self._ranks.world_size - 1}):
            layers = _InDdp(self._ranks, group, find_unused=self._find_unused, recoverable=True)
            for place in (0, FORWARD, *reversed(range(len(FACTORS))), LATE):
                self.place = f"after a failure of rank {rank}"
                if not layers.failure_is_seen(rank, place):
                    self.problem = self.problem or f"a failure of rank {rank} is not seen"
                self._clean(layers)
            layers.close()
        dist.destroy_process_group(group)

    def _clean(self, layers: "_InDdp") -> None:
        if not layers.sums_right():
            self.problem = self.problem or f"the sum of gradients is wrong, {self.place}"


class _InDdp:
    """The toy network in DDP, and its steps. Collective, all of it."""

    def __init__(
        self, ranks: Ranks, group: dist.ProcessGroup, *, find_unused: bool, recoverable: bool
    ) -> None:
        self._rank = ranks.rank
        self._net = _Layers(ranks.device, with_unused=find_unused)
        self._ddp = wrapped(self._net, find_unused=find_unused, group=group, bucket_mib=BUCKET_MIB)
        params = list(self._net.parameters())
        self._gradients = BucketGradients(self._ddp, params, ranks, recoverable=recoverable)
        self._x = torch.arange(1.0, WIDTH + 1, device=ranks.device)
        shares = _shares(ranks.world_size)
        self._share = torch.tensor(
            shares[ranks.rank] * self._gradients.loss_factor, device=ranks.device
        )
        self._expected = [self._x * (sum(shares) * math.prod(FACTORS) / own) for own in FACTORS]

    def sums_right(self) -> bool:
        """Take a step without a failure; say whether its sums are those added by hand."""
        self._step()
        return all(
            param.grad is not None and torch.equal(param.grad, expected)
            for param, expected in zip(self._net.weights, self._expected, strict=True)
        )

    def failure_is_seen(self, rank: int, place: int) -> bool:
        """Take a step in which `rank` fails; say whether this rank learns of it. It is given up."""
        self._net.fails_at = place if rank == self._rank else None
        failed = self._step()
        self._net.fails_at = None
        seen = failed if rank == self._rank else bool(self._gradients.norm().isnan())
        self._gradients.give_up()
        return seen

    def close(self) -> None:
        """Let go of DDP while its process group lives."""
        self._gradients.close()
        del self._ddp

    def _step(self) -> bool:
        """Return whether this rank failed in it."""
        failed = False
        self._gradients.begin()
        try:
            with self._gradients.piece(last=True):
                backward(self._ddp(self._x), self._share)
        except _InjectedError:
            failed = True
        self._gradients.reduce(poison=failed)
        return failed
