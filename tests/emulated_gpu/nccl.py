"""gloo in the place of NCCL, with what NCCL promises: a sum is enqueued, and nobody waits for it.

NCCL's futures are complete as soon as the collective is in its stream, so the callbacks of DDP's
hooks run at once. What reads the sum's memory afterwards comes after it, by the streams' order.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.emulated_gpu.copying import on_host


class Work:
    """A sum that is on its way."""

    def __init__(self, tensor: Tensor, finish: Callable[[], None]) -> None:
        self._tensor = tensor
        self._finish = finish

    def wait(self, *_: Any) -> bool:
        """Let the current stream wait, of which the host is the only one."""
        self._finish()
        return True

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        devices: Any = [self._tensor.device]
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=devices)
        future.set_result([self._tensor])
        return future


class Collectives:
    """The sums that were enqueued and that nothing has come after yet."""

    def __init__(self) -> None:
        # By the address of the memory that is summed, which lives as long.
        self.unfinished: dict[int, tuple[dist.Work, Tensor]] = {}

    def enqueue(self, tensor: Tensor, work: dist.Work) -> Work:
        """Keep a sum of the memory of `tensor`."""
        place = tensor.untyped_storage().data_ptr()
        self.unfinished[place] = (work, tensor)
        return Work(tensor, functools.partial(self._finish, place))

    def finish(self, tensors: list[Tensor]) -> None:
        """Wait for the sums of the memory that an operator is about to use."""
        for tensor in tensors:
            if tensor.is_cuda:
                self._finish(tensor.untyped_storage().data_ptr())

    def finish_all(self) -> None:
        for place in list(self.unfinished):
            self._finish(place)

    def _finish(self, place: int) -> None:
        work, _ = self.unfinished.pop(place, (None, None))
        if work is not None:
            work.wait()


@contextlib.contextmanager
def stands_for_nccl(collectives: Collectives) -> Iterator[None]:
    """Give whoever asks for NCCL a group of gloo, and sums that are only enqueued.

    The other collectives are gloo's own for tensors of a GPU, which wait.
    """
    begin, end, all_reduce = dist.init_process_group, dist.destroy_process_group, dist.all_reduce

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        begin("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        collectives.finish_all()
        end(*args, **kwargs)

    def enqueue(tensor: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if not tensor.is_cuda:
            return all_reduce(tensor, *args, async_op=async_op, **kwargs)
        collectives.finish([tensor])
        work = all_reduce(on_host(tensor), *args, async_op=True, **kwargs)
        assert work is not None
        enqueued = collectives.enqueue(tensor, work)
        return enqueued if async_op else None

    with (
        mock.patch.object(dist, "init_process_group", init_process_group),
        mock.patch.object(dist, "destroy_process_group", destroy_process_group),
        mock.patch.object(dist, "all_reduce", enqueue),
    ):
        yield
