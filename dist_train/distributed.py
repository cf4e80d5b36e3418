"""The ranks: their place, device and process groups, and collectives by name.

Every collective here is called by all ranks in the same order. With one process and no launcher
there is no process group and each of them is the identity.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import stop_with_parent, tell_begun, tell_met
from dist_train.config.check import check_world
from dist_train.device import (
    bind_device,
    check_precision,
    keep_freed_memory,
    leave_errors_to_python,
    set_determinism,
    threads_asked,
    threads_of,
)
from dist_train.heartbeat import Pulse
from dist_train.interface import VARIABLE as GLOO_VARIABLE
from dist_train.interface import check_interfaces, interface_for_gloo, loopback
from dist_train.layout import Layout, detect_layout
from dist_train.preemption import LAUNCHER_GONE
from dist_train.rendezvous import meet
from dist_train.torchrun_store import with_address_of_round

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """Another rank failed in a part of the start that all ranks take together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    attempt: int
    launcher: str
    started_by: str  # in words: the rule by which this process knew its place
    chain: str
    device: torch.device
    control: dist.ProcessGroup | None  # gloo, for decisions; None: no process group at all
    store: Store | None = None  # of this attempt
    pulse: Pulse = field(default_factory=Pulse, compare=False)  # says where this rank is

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place, on the training group. Collective."""
        if self.control is not None:
            with self.pulse.calling("all_reduce", tensor.numel()):
                dist.all_reduce(tensor)
        return tensor

    def read_sum(self, tensor: Tensor) -> list[Any]:
        """Sum `tensor` over the ranks and return it as nested lists. Collective, waits."""
        if self.control is None:
            return tensor.tolist()
        with self.pulse.calling("all_reduce", tensor.numel()):
            dist.all_reduce(tensor)
            return tensor.tolist()  # with NCCL this is what waits for the others

    def exchange(self, tensor: Tensor, partner: int) -> Tensor:
        """Send `tensor` to another rank and return its one, of the same shape. Both call it."""
        theirs = torch.empty_like(tensor)
        with self.pulse.calling("exchange", tensor.numel()):
            sides = [
                dist.P2POp(dist.isend, tensor, partner),
                dist.P2POp(dist.irecv, theirs, partner),
            ]
            for work in dist.batch_isend_irecv(sides):
                work.wait()
        return theirs

    def control_sum(self, values: Tensor) -> Tensor:
        """Sum a CPU tensor over the ranks, in place, without touching the device. Collective."""
        if self.control is not None:
            with self.pulse.calling("control_sum", values.numel()):
                dist.all_reduce(values, group=self.control)
        return values

    def any(self, flag: bool) -> bool:
        """Say whether `flag` holds on at least one rank. Collective."""
        return bool(self.control_sum(torch.tensor(float(flag))).item() > 0)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with rank 0's, on the training group. Collective."""
        if self.control is not None:
            with self.pulse.calling("broadcast", tensor.numel()):
                dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return every rank's picklable `value`, in rank order, on all ranks. Collective."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.pulse.calling("gather"):
            dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Return rank 0's `make()` on all ranks; its failure fails all. Collective."""
        value = self.together(make if self.rank == 0 else lambda: None)
        box: list[Any] = [value]
        if self.control is not None:
            with self.pulse.calling("broadcast"):
                dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Return rank 0's `data` on all ranks. Collective."""
        if self.control is None:
            assert data is not None, "rank 0 gives the bytes"
            return data
        size = torch.tensor(len(data) if data is not None else 0)
        with self.pulse.calling("broadcast"):
            dist.broadcast(size, src=0, group=self.control)
        box = torch.empty(int(size), dtype=torch.uint8)
        if data is not None:
            box.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        with self.pulse.calling("broadcast", box.numel()):
            dist.broadcast(box, src=0, group=self.control)
        return box.numpy().tobytes()

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        if self.control is not None:
            with self.pulse.calling("barrier"):
                dist.barrier(group=self.control)

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it fails on any, fail on all at once. Collective.

        Raises:
            ConfigError: some rank raised one: the lowest such rank's.
            RankFailedError: another rank raised something else; the culprit raises its own error.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            if self.control is None:
                raise
            failure = error
        told = None if failure is None else (isinstance(failure, ConfigError), str(failure))
        for rank, news in enumerate(self.gather(told)):
            if news is None:
                continue
            if rank == self.rank and failure is not None:
                raise failure
            mistake, text = news
            raise ConfigError(text) if mistake else RankFailedError(f"rank {rank} failed: {text}")
        return result  # type: ignore[return-value] # every rank succeeded

    def first_of_node_first(self, work: Callable[[], T]) -> T:
        """Run `work` on each node's first rank, then on the others. Collective.

        For downloads and caches: one process of a node does it, the rest find it done.
        """
        first = self.local_rank == 0
        result = self.together(work if first else lambda: None)
        others = self.together(work if not first else lambda: None)
        return result if first else others  # type: ignore[return-value] # of one of the two


@contextlib.contextmanager
def start_ranks(config: Config) -> Iterator[Ranks]:
    """Find this process's place, bind its device and join the others. Collective.

    Raises:
        ConfigError: the launcher's variables or the table of ranks make no sense; on all ranks.
        StoppedBeforeStartError: asked to stop, and the others have not come.
    """
    layout = detect_layout(os.environ, parent=os.getppid())
    check_world(config, layout.world_size)
    device, device_name, error = torch.device("cpu"), "cpu", None
    try:
        device, device_name = bind_device(config, layout)
        check_precision(config, device)
        if layout.launcher != "single":
            check_interfaces(os.environ, nccl=device.type == "cuda")
    except ConfigError as mistake:
        error = str(mistake)
    set_determinism(config)
    torch.set_num_threads(threads_of(threads_asked(config), layout, os.environ))
    if device.type == "cpu":
        keep_freed_memory()
    if layout.launcher == "single":
        if error is not None:
            raise ConfigError(error)
        yield _ranks(layout, device, None)
        return
    if layout.launcher == "torchrun":
        stop_with_parent(LAUNCHER_GONE)
    name = None
    if layout.local_world_size < layout.world_size:
        name = interface_for_gloo(os.environ, layout.master_addr)
    elif layout.launcher != "torchrun" or "LOCAL_WORLD_SIZE" in os.environ:
        name = loopback()  # the host's own name may lead nowhere
    if name is not None:
        os.environ.setdefault(GLOO_VARIABLE, name)
    if device.type == "cuda":
        leave_errors_to_python(config)
    start = timedelta(seconds=config.parallel.start_timeout_sec)
    layout = with_address_of_round(layout, os.environ)
    store, layout = meet(layout, config, device_name, error)
    if layout.local_rank == 0:
        tell_met(layout.chain, layout.attempt)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=layout.rank,
        world_size=layout.world_size,
        timeout=start,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        control = dist.new_group(backend="gloo", timeout=start)
        assert isinstance(control, dist.ProcessGroup)
        yield _ranks(layout, device, control, store)
    except BaseException:
        # NCCL's would wait for collectives that the other ranks may never join; this process ends.
        if device.type != "cuda" or layout.world_size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def single_process() -> Ranks:
    """Return one CPU process without a launcher: for what looks at data and model only."""
    return _ranks(Layout(launcher="single"), torch.device("cpu"), None)


def shorten_timeouts(ranks: Ranks, seconds: float) -> None:
    """After the first step: a collective that takes this long is a failure, not a slow start."""
    if ranks.control is None:
        return
    if ranks.local_rank == 0:
        tell_begun()
    newer = getattr(dist, "set_timeout", None)  # public from torch 2.15 on
    set_timeout = newer or dist.distributed_c10d._set_pg_timeout
    for group in (dist.group.WORLD, ranks.control):
        set_timeout(timedelta(seconds=seconds), group)


def _ranks(
    layout: Layout,
    device: torch.device,
    control: dist.ProcessGroup | None,
    store: Store | None = None,
) -> Ranks:
    return Ranks(
        rank=layout.rank,
        local_rank=layout.local_rank,
        world_size=layout.world_size,
        local_world_size=layout.local_world_size,
        attempt=layout.attempt,
        launcher=layout.launcher,
        started_by=layout.rule,
        chain=layout.chain,
        device=device,
        control=control,
        store=store,
    )
