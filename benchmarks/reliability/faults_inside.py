"""Faults that a rank does to itself at a chosen step; each makes its mark when it fires.

`rank` is the rank it is meant for; None: all of them.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SAVE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def around_step(stack: ExitStack, work: Callable[[Any, int, Callable[[], Any]], Any]) -> None:
    """Let `work(parts, step, take)` stand for every training step; `take()` takes it."""
    from dist_train import train as loop

    real = loop.train_step

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return work(args[0], kwargs["step"], lambda: real(*args, **kwargs))

    stack.enter_context(mock.patch.object(loop, "train_step", wrapped))


def end_by(how: str, step: int) -> None:
    """End this process, or raise, in one of the ways in which ranks die."""
    if how == "segfault":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how == "_exit":
        os._exit(1)
    elif how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    elif how == "exception":
        raise ValueError(f"injected at step {step}")
    else:
        os.kill(os.getpid(), getattr(signal, how))


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """End by `how` before the first step from `step` on."""

    rank: int | None
    step: int
    how: str
    mark: str

    def arm(self, stack: ExitStack) -> None:
        """Patch the loop."""

        def work(_parts: Any, step: int, take: Callable[[], Any]) -> Any:
            if step >= self.step and not Path(self.mark).exists():
                Path(self.mark).touch()
                end_by(self.how, step)
            return take()

        around_step(stack, work)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeathInSave:
    """Die in the first save from `step` on.

    Either at the `event`-th file operation in the checkpoint folder, or once the share `cut` of
    a checkpoint's bytes is written: the kernel then cuts the write and ends the process.
    """

    rank: int
    step: int
    mark: str
    event: int = 0
    cut: float | None = None

    def arm(self, stack: ExitStack) -> None:
        """Watch this process's file operations; cannot be taken back."""
        now = {"step": -1, "events": 0}

        def work(_parts: Any, step: int, take: Callable[[], Any]) -> Any:
            now["step"] = step
            return take()

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event not in SAVE_EVENTS or now["step"] < self.step:
                return
            if not isinstance(args[0], str | os.PathLike) or "/checkpoints" not in str(args[0]):
                return
            if event == "open" and not (args[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            now["events"] += 1
            if self.cut is not None and event == "open":
                Path(self.mark).touch()
                _let_sigxfsz_kill()
                older = Path(args[0]).parents[1].glob("step_*/*")
                size = max((f.stat().st_size for f in older), default=50_000)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * self.cut), -1))
            elif self.cut is None and now["events"] > self.event:
                Path(self.mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        around_step(stack, work)
        sys.addaudithook(hook)


def _let_sigxfsz_kill() -> None:
    """Undo Python's SIG_IGN; in the writer's thread only the C library allows it."""
    ctypes.CDLL(None).signal(int(signal.SIGXFSZ), ctypes.c_void_p(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class NotFinite:
    """Make loss, gradient or input of this rank `value` from step `first` to `last`.

    Without `last` it stays so, also when the batch is looked at again outside the step.
    """

    rank: int | None
    first: int
    last: int | None  # included
    where: str  # loss | gradient | input
    value: float
    mark: str

    def arm(self, stack: ExitStack) -> None:
        """Patch the loop."""
        from dist_train.tasks import classification

        def work(parts: Any, step: int, take: Callable[[], Any]) -> Any:
            last = step if self.last is None else self.last
            if not self.first <= step <= last or (self.last is None and Path(self.mark).exists()):
                return take()
            Path(self.mark).touch()
            module: torch.nn.Module = parts.replica.module
            if self.where == "loss":
                real = classification.loss_sum

                def loss_sum(*args: Any, **kwargs: Any) -> Any:
                    return real(*args, **kwargs) * self.value

                patch = mock.patch.object(classification, "loss_sum", loss_sum)
                if self.last is None:
                    stack.enter_context(patch)
                    return take()
                with patch:
                    return take()
            if self.where == "gradient":
                handle = next(module.parameters()).register_hook(lambda grad: grad * self.value)
            else:
                handle = module.register_forward_pre_hook(
                    lambda _module, args: (args[0] * self.value, *args[1:])
                )
            try:
                return take()
            finally:
                if self.last is not None:
                    handle.remove()

        around_step(stack, work)


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalAt:
    """Send this process a signal at a place, `times` times.

    Places: "before init", "step" (of `step`), "evaluation", "save".
    """

    rank: int | None
    step: int
    place: str
    number: int
    mark: str
    times: int = 1

    def arm(self, stack: ExitStack) -> None:
        """Patch the place."""
        now = {"step": 0 if self.step == 0 else -1}

        def fire() -> None:
            if now["step"] >= self.step and not Path(self.mark).exists():
                Path(self.mark).touch()
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)

        if self.place == "before init":
            from torch import distributed

            before(stack, distributed, "init_process_group", fire)
            return

        def work(_parts: Any, step: int, take: Callable[[], Any]) -> Any:
            now["step"] = step
            if self.place == "step":
                fire()
            return take()

        around_step(stack, work)
        if self.place == "evaluation":
            from dist_train.tasks import classification

            before(stack, classification, "eval_sums", fire)
        elif self.place == "save":
            from dist_train.run import Run

            before(stack, Run, "save", fire)


def before(stack: ExitStack, owner: Any, name: str, call: Callable[[], None]) -> None:
    """Call something before each call of owner.name."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call()
        return real(*args, **kwargs)

    stack.enter_context(mock.patch.object(owner, name, wrapped))


@dataclass(frozen=True, kw_only=True, slots=True)
class NoteSamples:
    """Write what every step trains on to a file: step, first position, digests of the pictures."""

    rank: int | None
    path: str

    def arm(self, stack: ExitStack) -> None:
        """Patch the data set's batches on their way into the step."""
        import hashlib
        import json

        from dist_train import train as loop

        real = loop.train_step

        def wrapped(parts: Any, feed: Any, **kwargs: Any) -> Any:
            batch = feed.take(kwargs["step"])
            rows = [
                hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:12]
                for image in batch.images
            ]
            sums = real(parts, feed, **kwargs)
            record = {"step": kwargs["step"], "first": batch.first_position, "rows": rows}
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
            return sums

        stack.enter_context(mock.patch.object(loop, "train_step", wrapped))
