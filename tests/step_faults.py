"""Faults inside a step: one rank fails in a chosen piece, layer or bucket, at a chosen step."""

import functools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PLACES = (
    "copy",
    "forward",
    "before the backward",
    "backward",
    "after the last gradient",
    "before the all-reduce",  # ddp: too late, and out of reach
    "optimizer",  # out of reach in every form
)
KINDS = ("memory", "real memory", "error", "sticky", "nan", "inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFault:
    """What goes wrong, where and when."""

    ranks: tuple[int, ...]
    step: int
    place: str = "forward"  # one of PLACES, or "bucket K"
    kind: str = "memory"
    layer: int = 3  # of the network's sequence, for forward and backward
    piece: int = 0  # which micro-batch; of no meaning to "copy" and "optimizer"
    times: int = 1
    above: int = 0  # only for pieces of more samples than this: a shortage that ends


@dataclass(slots=True)
class Clock:
    """Where the rank is, and what has fired."""

    step: int = -1
    piece: int = -1
    size: int = 0
    fired: dict[StepFault, int] = field(default_factory=dict)


class SmallBuckets(DistributedDataParallel):
    """DDP with buckets so small that a tiny network has several."""

    @functools.wraps(DistributedDataParallel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"bucket_cap_mb": 0.0001} | kwargs)


class _RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fire: Any) -> Tensor:
        ctx.fire = fire
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override] # as torch's
        return ctx.fire(grad), None


@contextmanager
def faulty(faults: tuple[StepFault, ...]) -> Iterator[Clock]:
    """Arm this rank's faults around `train(config)`."""
    from dist_train import ddp
    from dist_train import step as step_module
    from dist_train import train as loop
    from dist_train.data.memory_loader import MemoryLoader

    clock = Clock()
    mine = [f for f in faults if int(os.environ.get("RANK", "0")) in f.ranks]

    def fire(place: str, value: Any, layer: int | None = None) -> Any:
        for fault in mine:
            here = (fault.place, fault.step, fault.piece) == (place, clock.step, clock.piece)
            if place == "copy":
                here = (fault.place, fault.step) == (place, clock.step)
            if not here or (layer is not None and fault.layer != layer):
                continue
            if clock.fired.get(fault, 0) >= fault.times or clock.size <= fault.above:
                continue
            clock.fired[fault] = clock.fired.get(fault, 0) + 1
            value = _go_wrong(fault, value)
        return value

    def instrument(module: nn.Module) -> None:
        def enter(_module: nn.Module, inputs: tuple[Tensor]) -> Any:
            if not (module.training and torch.is_grad_enabled()):
                return None
            clock.piece += 1
            clock.size = len(inputs[0])
            if any(f.place == "after the last gradient" for f in mine):
                late = functools.partial(fire, "after the last gradient")
                return (_RaiseInBackward.apply(inputs[0].requires_grad_(), late),)
            return None

        def around(number: int, layer: nn.Module) -> None:
            def leave(_module: nn.Module, _inputs: Any, output: Tensor) -> Any:
                if not (module.training and torch.is_grad_enabled()):
                    return None
                output = fire("forward", output, number)
                if output.requires_grad and any(f.place == "backward" for f in mine):
                    output.register_hook(lambda grad: fire("backward", grad, number))
                return output

            layer.register_forward_hook(leave)

        module.register_forward_pre_hook(enter)
        for number, layer in enumerate(module.children()):
            around(number, layer)

    with ExitStack() as stack:

        def wrap(owner: Any, name: str, make: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

        def stepping(real: Any) -> Any:
            def train_step(*args: Any, **kwargs: Any) -> Any:
                clock.step = kwargs["step"]
                try:
                    return real(*args, **kwargs)
                finally:
                    clock.step = -1  # what follows is no step: evaluation, attribution

            return train_step

        def building(real: Any) -> Any:
            def build_parts(*args: Any, **kwargs: Any) -> Any:
                parts = real(*args, **kwargs)
                instrument(parts.replica.module)
                wrap(parts.replica.gradients, "begin", beginning)
                take_step = parts.take_step

                def stepped() -> None:
                    clock.piece = 0
                    fire("optimizer", None)
                    take_step()

                parts.take_step = stepped
                return parts

            return build_parts

        def beginning(real: Any) -> Any:
            def begin() -> None:
                clock.piece = -1
                real()

            return begin

        def summing(real: Any) -> Any:
            def outcome(*args: Any) -> Any:
                return fire("before the backward", real(*args))

            return outcome

        def accumulating(real: Any) -> Any:
            def accumulate(*args: Any, **kwargs: Any) -> Any:
                real(*args, **kwargs)
                fire("before the all-reduce", None)

            return accumulate

        def loading(real: Any) -> Any:
            def augmented(self: Any, *args: Any) -> Any:
                clock.size = 1 << 30
                return fire("copy", real(self, *args))

            return augmented

        def hooking(real: Any) -> Any:
            @functools.wraps(real)  # DDP reads its annotations
            def hook(self: Any, state: Any, bucket: Any) -> Any:
                fire(f"bucket {bucket.index()}", None)
                return real(self, state, bucket)

            return hook

        wrap(loop, "train_step", stepping)
        wrap(loop, "build_parts", building)
        wrap(step_module.task, "outcome", summing)
        wrap(step_module, "_accumulate", accumulating)
        wrap(MemoryLoader, "_augmented", loading)
        wrap(ddp.BucketGradients, "_hook", hooking)
        stack.enter_context(mock.patch.object(ddp, "DistributedDataParallel", SmallBuckets))
        stack.enter_context(mock.patch("torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", 100))
        yield clock


def _go_wrong(fault: StepFault, value: Any) -> Any:
    if fault.kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")
    if fault.kind == "real memory":
        torch.empty(1 << 50, dtype=torch.uint8)
    if fault.kind == "sticky":
        raise torch.AcceleratorError("CUDA error: misaligned address (injected)")
    if fault.kind == "error":
        raise ValueError("a bug in the user's code (injected)")
    bad = torch.nan if fault.kind == "nan" else torch.inf
    return value * bad if isinstance(value, Tensor) else value
