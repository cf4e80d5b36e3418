"""One rank's failure in the middle of a step, taken back by all ranks together.

A rank that runs out of memory, raises or computes a NaN contributes NaN to the sum of gradients.
The norm of the sum is then not finite on any rank, so all of them come here, tell each other what
happened and decide alike: repeat the step in smaller pieces, skip it, or fail with the same cause.
"""

import gc
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from dist_train.broken_device import is_broken_device
from dist_train.config import Config, ConfigError
from dist_train.config.user_code import is_of_machine
from dist_train.memory import ONE_SAMPLE, is_out_of_memory
from dist_train.nonfinite import NonFiniteGuard
from dist_train.parallel import Replica
from dist_train.step_failure import Failure, failed, failure_of, in_words, is_of_group

Verdict = Literal["apply", "retry", "skip"]


class RollBack(Exception):  # noqa: N818 # a request, raised on all ranks together
    """Go back to the last good checkpoint; with `new_order` never the same way again."""

    def __init__(self, reason: str, *, new_order: bool) -> None:
        super().__init__(reason)
        self.new_order = new_order


class Recovery:
    """Decides, equally on all ranks, what becomes of a step; holds the micro-batch in force."""

    def __init__(
        self,
        config: Config,
        replica: Replica,
        guard: NonFiniteGuard,
        *,
        remember: Callable[[int], None],
    ) -> None:
        """Begin with the configured micro-batch.

        Args:
            config: of the run.
            replica: whose steps these are.
            guard: which reads the norms.
            remember: called with the micro-batch that a restart should begin with, on a rank
                that is short of memory where the step cannot be repeated.
        """
        size = config.train.micro_batch_size
        self.micro_batch_size = None if size == "auto" else size
        self.shortage = ""  # why the micro-batch in force is smaller than the one asked for
        self.events: list[dict[str, Any]] = []  # for rank 0 to record; the same on all ranks
        self._config = config
        self._replica = replica
        self._guard = guard
        self._remember = remember
        self._failures: dict[int, Failure] = {}  # this rank's, by step, until it is agreed on
        self._repeated = -1  # fixed order: the step that had its second try

    def contain(self, error: Exception, *, at_start: bool = False) -> Failure:
        """Turn an exception in a step into this rank's part of the agreement, or raise it again.

        It is raised where the peers cannot be reached through the gradients: a broken process
        group, a device that accepts no more work, collectives inside the model.

        Args:
            error: what was raised.
            at_start: nothing was trained yet: what the user's own code raises, it would raise
                after a restart, too, and is a mistake.
        """
        of_group = is_of_group(error)
        shown = error
        if not (of_group or is_out_of_memory(error) or is_of_machine(error)):
            shown = in_words(error, at_start=at_start)
        out_of_reach = not self._replica.recoverable or self._replica.gradients.all_sent
        if of_group or out_of_reach or is_broken_device(error):
            self.remember_shortage(error)
            if shown is not error:
                raise shown from error
            raise error
        return failure_of(error, shown, self._replica.ranks)

    def remember_shortage(self, error: Exception) -> None:
        """Let a restart begin with half the micro-batch, if an error that ends this is of memory.

        In fixed order a shard is what is computed at once, and a restart cannot cut it.
        """
        if is_out_of_memory(error) and self._replica.form != "fixed":
            self._remember((self._largest() + 1) // 2)

    def decide(self, grad_norm: Tensor, failure: Failure | None, step: int) -> Verdict:
        """Say what to do with the step: the same on all ranks. Collective if anything is wrong.

        Waits for the device unless guards.lag=1: then the verdict on a step is read a step later,
        when it cannot be repeated any more; the fused optimizer has skipped it on the device.

        Raises:
            StepFailedError: it failed for good on some rank.
            ConfigError: the user's mistake on some rank, found in the step.
        """
        if failure is not None:
            self._failures[step] = failure
            grad_norm = torch.full_like(grad_norm, torch.nan)
        verdict: Verdict = "apply"
        for at, finite in self._guard.read(grad_norm, step):
            if finite:
                verdict, self._repeated = "apply", -1
            else:
                verdict = self._agree(at, current=at == step)
        return "apply" if self._config.guards.lag else verdict

    def fail(self, failure: Failure | None, doing: str) -> NoReturn:
        """Fail on all ranks because some rank failed outside a step. Collective.

        Args:
            failure: this rank's, if it is the one.
            doing: what it was, after "failed".
        """
        found = [f for f in self._replica.ranks.gather(failure) if f]
        first = found[0]
        if first.kind == "mistake":
            raise ConfigError(first.text)
        raise failed(first, f"rank {first.rank} failed {doing}: {first.text}")

    def settle(self) -> None:
        """Read what guards.lag=1 left open, at a boundary. Collective."""
        for at, finite in self._guard.settle():
            if not finite:
                self._agree(at, current=False)

    def trial(self, failure: Failure | None, step: int) -> bool:
        """Say whether a trial of the step, before training, is to be repeated. Collective.

        Raises:
            StepFailedError, ConfigError: it failed for good on some rank.
        """
        if not self._replica.ranks.any(failure is not None):
            self._repeated = -1
            return False
        if failure is not None:
            self._failures[step] = failure
        return self._agree(step, current=True) == "retry"

    def take_events(self) -> list[dict[str, Any]]:
        """Return what happened since the last call, to be recorded."""
        events, self.events = self.events, []
        return events

    def state_dict(self) -> dict[str, Any]:
        """Return the micro-batch in force, and the one that the run was started with."""
        return {
            "in_force": self.micro_batch_size,
            "asked": self._config.train.micro_batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the micro-batch in force, unless the command now asks for another one."""
        if state["asked"] == self._config.train.micro_batch_size:
            self.micro_batch_size = state["in_force"]

    def _agree(self, step: int, *, current: bool) -> Verdict:
        """Tell all ranks what went wrong on each, and draw the same conclusion. Collective."""
        found = [f for f in self._replica.ranks.gather(self._failures.pop(step, None)) if f]
        if current:
            self._replica.buffers.restore()
            self._replica.gradients.give_up()
        worst = next((f for f in found if f.kind not in ("memory", "no gradient")), None)
        if worst is not None and self.shortage and ONE_SAMPLE in worst.text:
            raise failed(
                worst,
                f"rank {worst.rank} failed at step {step}: {self.shortage}, and BatchNorm needs "
                "more than one sample at once: use a smaller model, smaller images or more ranks",
            )
        if worst is not None and worst.kind == "mistake":
            raise ConfigError(worst.text)
        if worst is not None:
            raise failed(worst, f"rank {worst.rank} failed at step {step}: {worst.text}")
        without = next((f for f in found if f.kind == "no gradient"), None)
        if without is not None:
            return self._repeat_without_ddp(without, step, current=current)
        if found:
            return self._repeat_smaller(found, step, current=current)
        self._repeated = -1
        self.events.append(
            {"event": "skipped_step", "step": step, "reason": "gradient norm is not finite"}
        )
        return "skip"

    def _repeat_without_ddp(self, first: Failure, step: int, *, current: bool) -> Verdict:
        """Sum the gradients as one buffer from here on, which takes a missing one as zeros.

        Raises:
            ConfigError: DDP was asked for, or guards.lag=1 tells of the step too late.
        """
        told = f"step {step} on rank {first.rank}: {first.text}"
        if self._config.parallel.sync != "auto" or not current:
            raise ConfigError(
                f"{told}, and DDP waits for its gradient: set parallel.sync=flat, or "
                "parallel.find_unused_parameters=true"
            )
        self._guard.take_back()
        self._replica.use_flat()
        say = f"{told}: from here on parallel.sync=flat, which needs no gradient of every parameter"
        self.events.append({"event": "flat_sum", "step": step, "say": say, "reason": first.text})
        return "retry"

    def _repeat_smaller(self, found: list[Failure], step: int, *, current: bool) -> Verdict:
        first, ranks, now = found[0], self._replica.ranks, self._largest()
        where = f"rank {first.rank} ran out of memory at step {step}"
        self._guard.take_back()
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        event = {
            "event": "out_of_memory",
            "step": step,
            "ranks": [f.rank for f in found],
            "reason": first.text,
            "memory": first.memory,
        }
        if self._replica.form == "fixed":
            shards = self._config.train.num_shards
            if not current:
                cure = "with guards.lag=1, where a step cannot be repeated: set guards.lag=0"
                raise failed(first, f"{where}, {cure} ({first.text})")
            if self._repeated == step:
                raise failed(
                    first,
                    f"{where}, also in the second try: in fixed order a shard is what is computed "
                    f"at once: raise train.num_shards (= {shards}), which is another run, or "
                    "lower train.global_batch_size",
                )
            self._repeated = step
            self.events.append(event | {"say": f"{where}: the step is repeated"})
            return "retry"
        if now <= 1 or not current:
            if now > 1:
                self._remember((now + 1) // 2)
            cure = (
                "even with one sample at a time: use a smaller model or smaller pictures"
                if now <= 1
                else f"with guards.lag=1, where a step cannot be repeated: set guards.lag=0, or "
                f"train.micro_batch_size={(now + 1) // 2}"
            )
            raise failed(first, f"{where}, {cure} ({first.text})")
        self.micro_batch_size = (now + 1) // 2
        self.shortage = f"{where} with micro-batches of {now} ({first.text})"
        say = f"{where}: micro-batch {now} -> {self.micro_batch_size} on all, the step is repeated"
        self.events.append(event | {"say": say, "from": now, "to": self.micro_batch_size})
        return "retry"

    def _largest(self) -> int:
        """Return the largest micro-batch in force: equal on all ranks."""
        whole = -(-self._config.train.global_batch_size // self._replica.ranks.world_size)
        return min(self.micro_batch_size or whole, whole)
