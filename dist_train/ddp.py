"""DDP's buckets, reduced while the backward still runs, in a form that survives one rank's failure.

DDP waits for every bucket of every rank. A rank that fails in the middle therefore sends NaN in
the buckets that it still owes, and all ranks drop the attempt together. This needs a few of DDP's
private methods, the ones of its own `Join`: ddp_check.py tries out whether they do here.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.distributed import Ranks


class NoGradientError(RuntimeError):
    """A parameter had no part in this rank's loss: DDP waits for its gradient, and for ever."""


def wrapped(
    module: nn.Module,
    *,
    find_unused: bool,
    group: dist.ProcessGroup | None = None,
    bucket_mib: float | None = None,
) -> DistributedDataParallel:
    """Return the module in DDP, whose parameters and buffers are alike on all ranks.

    Args:
        module: what is wrapped.
        find_unused: look for parameters that have no part in the loss, in every step.
        group: whose ranks sum; None: all.
        bucket_mib: of a bucket, at most; None: DDP's own.
    """
    # torch 2.15 renamed broadcast_buffers. Buffers are agreed on before an evaluation instead.
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    if bucket_mib is not None:
        options["bucket_cap_mb"] = bucket_mib
    return DistributedDataParallel(
        module,
        process_group=group,
        init_sync=False,
        find_unused_parameters=find_unused,
        gradient_as_bucket_view=True,
        **options,
    )


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

    @contextlib.contextmanager
    def piece(self, *, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self._ddp.no_sync():
            yield
        if last and self.recoverable and not self.all_sent:
            named = self._ddp.module.named_parameters()
            first = next((n for n, p in named if p.requires_grad and p.grad is None), "one")
            raise NoGradientError(f"the loss does not depend on the parameter {first!r}")

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

    def close(self) -> None:
        """Let go of DDP, which holds this object through its hook, where no collector looks."""
        self._buckets.clear()
        del self._ddp

    def norm(self) -> Tensor:
        norm = nn.utils.get_total_norm(self._grads())
        if self._ddp.find_unused_parameters and self._buckets:
            # What a rank that failed owed last is NaN, and no gradient where no rank used it.
            norm = norm + 0 * self._buckets[max(self._buckets)][0]
        return norm

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
        work = dist.all_reduce(tensor, group=self._ddp.process_group, async_op=True)
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
