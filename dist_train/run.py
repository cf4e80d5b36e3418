"""A run's life around the loop: resume, save, report, and end truthfully."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dist_train.checkpoint import (
    CheckpointWriter,
    load_state,
    newest_good,
    read_verified,
)
from dist_train.config import Config, ConfigError
from dist_train.config.identity import length_of
from dist_train.data.loaders import Data
from dist_train.distributed import Ranks
from dist_train.metrics import Meter
from dist_train.optim import learning_rate
from dist_train.plan import Plan
from dist_train.progress import Progress
from dist_train.run_folder import RunFolder, cpu_name
from dist_train.state import Parts, capture, check_facts, restore, run_facts
from dist_train.summary import make_summary, table
from dist_train.tracking import Trackers, open_trackers


class Run:
    """One attempt at a run, on every rank; only rank 0's writes and speaks."""

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks) -> None:
        self.config = config
        self.folder = folder
        self.path = folder.path
        self.ranks = ranks
        self.finished: dict[str, Any] | None = None
        self._facts: dict[str, Any] = {}
        self._bytes = b""  # of the checkpoint found, on rank 0, until it is handed out
        self._progress: Progress | None = None
        self._writer: CheckpointWriter | None = None  # on rank 0
        self._trackers = Trackers()
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Show a line on rank 0's console and keep it in log/rank0.txt."""
        if self.ranks.rank != 0:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with (self.path / "log" / "rank0.txt").open("a") as log:
            log.writelines(f"{stamp} {line}\n" for line in text.splitlines())
        if self._trackers.is_open:
            self._trackers.message(text)
        else:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def warn(self, *texts: str | None) -> None:
        """Say each text in a way that nobody misses; None is nothing to say."""
        for text in filter(None, texts):
            self.say(f"*** {text} ***")

    def resume(self, parts: Parts, meter: Meter, data: dict[str, Any]) -> Progress:
        """Take up the newest good checkpoint, or the one asked for, or start anew. Collective.

        The run's own checkpoints win over resume=PATH: a restart continues, it does not start
        over. Rank 0 reads and verifies; the others get its bytes, so no shared disk is needed.

        Raises:
            ConfigError: no checkpoint is good, or it does not belong to this run.
        """
        self._facts = run_facts(parts, data, cpu_name())
        found = self.ranks.from_first(self._find_checkpoint)
        if found is None:
            self._progress = Progress(patience=self.config.train.early_stop_patience)
            self._check_space(parts)
            self._begin(self._progress)
            return self._progress
        data_bytes = self._bytes if self.ranks.rank == 0 else None
        state = load_state(self.ranks.broadcast_bytes(data_bytes))
        self._bytes = b""

        def take_up() -> tuple[Progress, list[str]]:
            warnings = check_facts(state["facts"], self._facts, found)
            return restore(state, parts, meter, found), warnings

        progress, warnings = self.ranks.together(take_up)
        progress.patience = self.config.train.early_stop_patience
        if Path(found).parent != self.folder.checkpoints:
            progress.begin_elsewhere()
        if progress.step > parts.plan.total_steps:
            raise ConfigError(
                f"{self.path} is at step {progress.step} already, beyond the "
                f"{parts.plan.total_steps} steps of {length_of(self.config)}: ask for more, or "
                "use another run_dir"
            )
        self._progress = progress
        self._check_space(parts)
        self._begin(progress)
        self.warn(*warnings)
        self.say(f"resumed from {found} at step {progress.step}")
        self.folder.event("resumed", step=progress.step, checkpoint=found, warnings=warnings)
        if progress.patience_is_over:
            self.warn(
                f"this run was stopped early at step {progress.step} and does not go on: to train "
                "further raise train.early_stop_patience, with "
                "resume_allow=[train.early_stop_patience]"
            )
        return progress

    def _begin(self, progress: Progress) -> None:
        self.folder.write_start(self.config)
        self.folder.set_status("running", step=progress.step)

    def _find_checkpoint(self) -> str | None:
        best = newest_good(self.folder.checkpoints, self.warn)
        if best is None and self.config.resume not in ("auto", "never"):
            path = Path(self.config.resume)
            best = (path, read_verified(path))
        if best is None:
            return None
        self._bytes = best[1]
        return str(best[0])

    def _check_space(self, parts: Parts) -> None:
        """Refuse a disk on which the checkpoints to come cannot fit. Collective."""
        state = capture(parts, Progress(), None, {})
        size = sum(t.numel() * t.element_size() for t in _tensors(state))
        keep = self.config.checkpoint.keep_last
        self.ranks.from_first(lambda: self.folder.check_space(size, keep))

    def load_best(self, parts: Parts, progress: Progress) -> None:
        """Load the weights of the best validation accuracy. Collective."""
        path = self.folder.checkpoints / f"step_{progress.best_step:08d}"

        def read() -> bytes:
            if self._writer is not None:
                self._writer.wait()  # the best may be the one being written
            return read_verified(path)

        data = self.ranks.from_first(read)
        state = load_state(data)
        parts.replica.module.load_state_dict(state["model"])
        if parts.ema is not None and state["ema"] is not None:
            parts.ema.load_state_dict(state["ema"])
        self.say(f"early stopping: the weights of step {progress.best_step} are taken")

    def open_writer(self, stack: ExitStack) -> None:
        """Open the checkpoint writer on rank 0; it is closed with `stack`."""
        if self.ranks.rank != 0:
            return
        self._writer = CheckpointWriter(
            self.folder.checkpoints,
            keep_last=self.config.checkpoint.keep_last,
            on_saved=lambda step: self.folder.event("saved", step=step),
            on_error=self._save_failed,
        )
        stack.callback(self._writer.close)

    def open_trackers(self, stack: ExitStack, progress: Progress, plan: Plan) -> Trackers:
        """Open the trackers on rank 0, none elsewhere; closed with `stack`. Collective."""
        if self.ranks.rank == 0:
            opened = self.ranks.together(
                lambda: open_trackers(
                    self.config,
                    self.path,
                    restored_step=progress.step,
                    evaluated=progress.evaluated_step == progress.step
                    or not plan.eval_due(progress.step),
                    wandb_id=progress.tracker_id,
                    total_steps=plan.total_steps,
                    stream=sys.stdout,
                    warn=self.warn,
                )
            )
            self._trackers = opened
        else:
            self.ranks.together(lambda: None)

        def close(_kind: object, error: BaseException | None, _trace: object) -> None:
            code = 0 if error is None else getattr(error, "exit_code", 1)
            self._trackers.close(exit_code=code)

        stack.push(close)
        return self._trackers

    def stamp(self, progress: Progress, plan: Plan) -> dict[str, Any]:
        """Return what every line of metrics begins with."""
        record: dict[str, Any] = {
            "step": progress.step,
            "attempt": self.ranks.attempt,
            "time": time.time(),
            "epoch": round(plan.epoch(progress.step), 4),
            "train/learning_rate": learning_rate(progress.step - 1, self.config.optim, plan),
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: KiB
        if self.ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        return record | {"memory/peak_gib": peak / 2**30}

    def log_evaluation(
        self, progress: Progress, plan: Plan, split: str, result: dict[str, float]
    ) -> None:
        """Write one line with an evaluation's numbers."""
        named = {f"eval/{name}": value for name, value in result.items()}
        self._trackers.log(self.stamp(progress, plan) | {"eval/split": split} | named)

    def save(self, parts: Parts, progress: Progress, meter: Meter) -> None:
        """Save this step on rank 0 in the background. Not collective."""
        if self._writer is None:
            return
        progress.wall_sec += self._lap()
        self.folder.set_status("running", step=progress.step)
        best = progress.best_step if self.config.checkpoint.keep_best else None
        self._writer.save(
            capture(parts, progress, meter, self._facts), step=progress.step, best_step=best
        )

    def end_preempted(self, progress: Progress, reasons: list[str | None]) -> dict[str, Any]:
        """Record that the run was stopped and saved. Not collective."""
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text is not None)
        if self._writer is not None and not self._writer.wait():
            raise OSError("the run was asked to stop, and its last checkpoint could not be saved")
        why = f"{reason} on rank {rank}"
        self.folder.event("preempted", step=progress.step, reason=why)
        self.folder.set_status("preempted", step=progress.step, exit_code=0, reason=why)
        self.say(f"stopped at step {progress.step} ({why}) and saved: the same command continues")
        return {"state": "preempted", "steps": progress.step, "run_dir": str(self.path)}

    def end_finished(
        self,
        parts: Parts,
        progress: Progress,
        data: Data,
        result: dict[str, float],
    ) -> dict[str, Any]:
        """Write the summary, print its table and record that the run is over. Not collective."""
        if self._writer is not None and not self._writer.wait():
            self.warn("the last checkpoint is missing; the summary stands")
        progress.wall_sec += self._lap()
        if parts.ema is not None:
            parts.ema.swap()  # the average is what was evaluated
        summary = make_summary(parts, progress, data, result, self._facts["device"], self.ranks)
        summary["run_dir"] = str(self.path)
        self.folder.write_summary(summary)
        self.folder.event("finished", step=progress.step)
        self.folder.set_status("finished", step=progress.step, exit_code=0)
        self.say(table(summary))
        return summary

    def failed(self, error: BaseException) -> None:
        """Record why this attempt failed; the first rank to do so is believed."""
        now = self.folder.read_status()
        mine = (now.get("chain"), now.get("attempt")) == (self.ranks.chain, self.ranks.attempt)
        if (now.get("state") == "failed" and mine) or not self.path.is_dir():
            return
        if now.get("state") == "finished" and isinstance(error, ConfigError):
            return  # a wrong command does not undo a finished run
        code = getattr(error, "exit_code", 1)
        step = self._progress.step if self._progress else now.get("step", 0)
        reason = f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the disk may be the reason
            self.folder.set_status("failed", step=step, exit_code=code, reason=reason)
            self.folder.event("failed", step=step, reason=reason)

    def _save_failed(self, text: str) -> None:
        self.warn(text)
        self.folder.event("save_failed", step=self._progress.step if self._progress else 0)

    def _lap(self) -> float:
        now = time.monotonic()
        lap, self._started = now - self._started, now
        return lap


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
