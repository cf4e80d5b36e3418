"""DDP's buckets, reduced while the backward still runs, in a form that survives one rank's failure.

DDP waits for every bucket of every rank. A rank that fails in the middle therefore sends NaN in
the buckets that it still owes, and all ranks drop the attempt together. This needs a few of DDP's
private methods, the ones of its own `Join`: see TESTED for where they are known to hold.
"""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.distributed import Ranks

# (torch release, backend) on which tests/test_step_failures.py passes. Elsewhere a rank that fails
# in a step ends the run, and the launcher restarts it.
TESTED = {("2.11", "gloo"), ("2.14", "gloo"), ("2.15", "gloo")}


def is_tested(ranks: Ranks) -> bool:
    """Say whether recovery of overlapped buckets is proven for this torch and these devices."""
    release = ".".join(str(torch.__version__).split(".")[:2])
    return (release, "nccl" if ranks.device.type == "cuda" else "gloo") in TESTED


class BucketGradients:
    """DDP's own overlap; with `recoverable`, a hook on its buckets and a way out of a failure."""

    def __init__(
        self,
        ddp: DistributedDataParallel,
        params: list[nn.Parameter],
        ranks: Ranks,
        *,
        recoverable: bool,
    ) -> None:
        self._ddp = ddp
        self._params = params
        self._ranks = ranks
        self.recoverable = recoverable
        self.loss_factor = 1.0 if recoverable else float(ranks.world_size)  # plain DDP averages
        self._buckets: dict[int, Tensor] = {}  # the reducer's own flat buffers, by index
        self._fired = 0  # buckets whose all-reduce was issued in this attempt
        self._held = False  # the last bucket waits for the end of the backward
        self.all_sent = False
        self._works: list[dist.Work] = []
        if recoverable:
            ddp.register_comm_hook(None, self._hook)

    def begin(self) -> None:
        for param in self._params:
            param.grad = None
        if not self.recoverable:
            return
        # What DDP's forward would do collectively is done here, where nothing can fail before it.
        if not self._ddp._has_rebuilt_buckets:
            self._buckets.clear()  # the old buckets must not stay alive
        if self._ddp.reducer._rebuild_buckets():
            self._ddp._has_rebuilt_buckets = True
        self._fired, self._held, self._works = 0, False, []
        self.all_sent = False

    def piece(self, *, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self._ddp.no_sync()

    def reduce(self, *, poison: bool) -> None:
        if poison:
            self._poison()
        self.all_sent = False  # what fails from here on, as in an evaluation, is no bucket's matter

    def give_up(self) -> None:
        for param in self._params:
            param.grad = None
        self._works = []
        # On all ranks or on none: it arms the rebuilding of the buckets, which is collective.
        self._ddp.reducer._reset_state()
        self._ddp._has_rebuilt_buckets = False
        self._ddp.require_backward_grad_sync = True

    def norm(self) -> Tensor:
        return nn.utils.get_total_norm(self._grads())

    def scale(self, factor: Tensor) -> None:
        grads = self._grads()
        if grads:  # a rank that failed before its backward has none
            torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage] # torch's optimizers' own

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self._params if p.grad is not None]

    def _hook(
        self,
        _state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage] # DDP asks for this name
    ) -> torch.futures.Future[Tensor]:
        tensor, index = bucket.buffer(), bucket.index()
        self._buckets[index] = tensor
        if not bucket.is_last():
            work = self._all_reduce(tensor)
            self._fired = index + 1
            return work.get_future().then(lambda done: done.value()[0])
        # A failure after the last bucket would be invisible to the peers: it is held until the
        # whole backward has succeeded. The callback runs before the reducer's own last one.
        devices: Any = [] if tensor.device.type == "cpu" else [tensor.device]
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        self._held = True

        def issue() -> None:
            work = self._all_reduce(tensor)
            self._fired, self.all_sent = index + 1, True
            work.wait()
            future.set_result(tensor)

        self._after_backward(issue)
        return future

    def _after_backward(self, work: Callable[[], None]) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(work)

    def _all_reduce(self, tensor: Tensor) -> dist.Work:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        self._works.append(work)
        return work

    def _poison(self) -> None:
        """Issue what this rank still owes its peers, as NaN, in their order."""
        with self._ranks.pulse.calling("all_reduce"):
            self._send_nan()

    def _send_nan(self) -> None:
        for work in self._works:
            work.wait()  # a bucket in flight must not be written to
        tensors = [self._buckets[i] for i in sorted(self._buckets)]
        if sum(t.numel() for t in tensors) != sum(p.numel() for p in self._params):
            # The layout is new and not all of it was seen: what DDP's own Join does.
            zeros = self._ddp.reducer._get_zeros_like_grad_buckets()
            tensors = [bucket.buffer() for bucket in zeros]
        owes_map = self._ddp.find_unused_parameters and not self._held
        for index in range(self._fired, len(tensors)):
            if owes_map and index == len(tensors) - 1:  # the peers issue it when that one is ready
                self._all_reduce(self._ddp.reducer._get_local_used_map())
            tensors[index].fill_(math.nan)
            self._all_reduce(tensors[index])
        for work in self._works:
            work.wait()
