"""A run's life around the loop: resume, save, report, and end truthfully."""

import contextlib
import math
import os
import resource
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dist_train.attribution import Culprit
from dist_train.config import Config, ConfigError
from dist_train.config.identity import length_of
from dist_train.config.redact import redact
from dist_train.config.streams import put
from dist_train.data.loaders import Data
from dist_train.distributed import Ranks
from dist_train.failure import ChainNotes
from dist_train.imported_code import changes_of_code, imported_code
from dist_train.metrics import LossWatch, Meter
from dist_train.optim import learning_rate_in_force
from dist_train.plan import Plan
from dist_train.preemption import StopRequest, job_end
from dist_train.progress import Progress
from dist_train.run_folder import RunFolder, cpu_name
from dist_train.saved_states import SKIPPED_IN_A_ROW, SavedStates, bytes_of
from dist_train.saves import Saves
from dist_train.state import CODE, Parts, capture, check_facts, restore, run_facts
from dist_train.tracking import Trackers, open_trackers
from dist_train.weights import load_weights

ENDING_SEC = 15.0  # from the save to the end of all processes, and SLURM's answer to a requeue


class Run:
    """One attempt at a run, on every rank; only rank 0's writes and speaks."""

    def __init__(self, config: Config, folder: RunFolder, ranks: Ranks) -> None:
        self.config = config
        self.folder = folder
        self.path = folder.path
        self.ranks = ranks
        self.finished: dict[str, Any] | None = None
        self.took_up = False  # a state of this or another run
        self._checkpoint_bytes = 0
        self.chain = ChainNotes(folder.path, ranks, None)  # of restarts: what it remembers
        self.facts: dict[str, Any] = {}
        self.progress: Progress | None = None
        self.saves: Saves | None = None  # on rank 0
        self.earlier: tuple[int, float] = 0, 0.0  # attempts that died, their seconds in all
        self._trackers = Trackers()
        self._started = time.monotonic()
        self.states = SavedStates(config.resume, folder, ranks, self.warn)
        self.losses = LossWatch(config.guards.loss_spike)
        self._returns: Counter[int] = Counter()  # to each step, of this attempt
        self.blamed = ""  # where the last skipped step stopped being finite

    def say(self, text: str, *, last: bool = False) -> None:
        """Show a line on rank 0's console and keep it in log/rank0.txt; `last`: below its bar."""
        if self.ranks.rank != 0:
            return
        text = redact(text)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for line in text.splitlines():
            self.folder.log.append(f"{stamp} {line}")
        if self._trackers.is_open:
            self._trackers.message(text, last=last)
            return
        # It may be a file on a full disk, or closed; the log has the line.
        with contextlib.suppress(OSError, ValueError):
            put(sys.stdout, text + "\n")

    def warn(self, *texts: str | None) -> None:
        """Say each text in a way that nobody misses; None is nothing to say."""
        for text in filter(None, texts):
            self.say(f"*** {text} ***")

    def resume(self, parts: Parts, meter: Meter, data: Data) -> Progress:
        """Take up the newest good checkpoint, or the one asked for, or start anew. Collective.

        Own checkpoints that are newer, and so were refused, are set aside: the run writes its own
        in their place. May be called again in the same process; a save under way is waited for.

        Raises:
            ConfigError: no checkpoint is good, or it does not belong to this run.
            OSError: a refused one cannot be set aside.
        """
        code = imported_code(self.config) if self.ranks.rank == 0 else {}
        self.facts = redact(run_facts(parts, data.fingerprint(), data.content, cpu_name()))
        self.facts[CODE] = code
        found = self.states.newest()
        if found is None:
            self.progress = Progress(patience=self.config.train.early_stop_patience)
            self._begin(parts, self.progress)
            self.states.keep_start(capture(parts, self.progress, meter, self.facts))
            return self.progress
        origin, state = found

        def take_up() -> tuple[Progress, list[str]]:
            warnings = check_facts(state["facts"], self.facts, origin)
            return restore(state, parts, meter, origin), warnings

        progress, warnings = self.ranks.together(take_up)
        self.took_up = True
        if self.ranks.rank == 0:
            changes = changes_of_code(state["facts"].get(CODE, {}), code)
            if changes:
                since = f"since step {progress.step} was saved"
                warnings.append(f"{since} {', '.join(changes)}: the run goes on with today's code")
        progress.patience = self.config.train.early_stop_patience
        parts.guard.consecutive = state.get(SKIPPED_IN_A_ROW, 0)
        is_own = Path(origin).parent == self.folder.checkpoints
        if not is_own:
            progress.begin_elsewhere()
        if progress.step > parts.plan.total_steps:
            raise ConfigError(
                f"{self.path} is at step {progress.step} already, beyond the "
                f"{parts.plan.total_steps} steps of {length_of(self.config)}: ask for more, or "
                "use another run_dir"
            )
        self.progress = progress
        self._begin(parts, progress)
        if is_own:
            self.states.set_aside_after(progress.step, why="refused")
        else:
            self.states.keep_start(capture(parts, progress, meter, self.facts))
        self.warn(*warnings)
        self.say(f"resumed from {origin} at step {progress.step}")
        self.folder.event("resumed", step=progress.step, checkpoint=origin, warnings=warnings)
        if progress.patience_is_over:
            early = f"this run was stopped early at step {progress.step} and does not go on"
            self.warn(f"{early}: to train further {self.more_patience}")
        return progress

    @property
    def more_patience(self) -> str:
        """What lets a run go on that was stopped early."""
        key = "train.early_stop_patience"  # it is in the hash of the folder's name
        return f"raise {key}, with resume_allow=[{key}] and run_dir={self.path}"

    def _begin(self, parts: Parts, progress: Progress) -> None:
        size = bytes_of(capture(parts, Progress(), None, {}))
        self._checkpoint_bytes = size
        keep = self.config.checkpoint.keep_last
        self.ranks.from_first(lambda: self.folder.check_space(size, keep))
        self.folder.write_start(self.config, self.facts[CODE])
        ranks = self.ranks
        self.folder.event(
            "started",
            step=progress.step,
            world_size=ranks.world_size,
            started_by=ranks.started_by,
        )
        self.folder.set_status("running", step=progress.step)

    def load_best(self, parts: Parts, progress: Progress) -> None:
        """Load the weights of the best validation accuracy. Collective."""
        state = self.states.of_step(progress.best_step or 0)
        load_weights(parts.replica.module, parts.replica.buffers, state)
        if parts.ema is not None and state["ema"] is not None:
            parts.ema.load_state_dict(state["ema"])
        self.say(f"early stopping: the weights of step {progress.best_step} are taken")

    def open_writer(self, stack: ExitStack) -> None:
        """Open the checkpoint writer on rank 0; it is closed with `stack`."""
        if self.ranks.rank != 0:
            return
        self.saves = Saves(
            self.config.checkpoint,
            self.folder,
            num_ranks=self.ranks.world_size,
            earlier=self.earlier,
            say=self.say,
            warn=self.warn,
        )
        self.states.wait = self.saves.wait
        stack.callback(self.saves.close)

    def stop_before_job_ends(self, stop: StopRequest, meter: Meter) -> None:
        """Let rank 0 ask for a stop in time for a save before the job's time is over.

        The others learn of it where all agree. Not collective.
        """
        end_time = job_end(os.environ)
        if self.saves is None or end_time is None:
            return
        saves = self.saves

        def lead_sec() -> float:
            save_sec = saves.expected_sec(self._checkpoint_bytes)
            return save_sec + 2 * meter.slowest_sec + ENDING_SEC

        stop.end_before(end_time, lead_sec)
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(end_time))
        self.say(f"the job's time is over at {at}: the run saves and stops in time")

    def open_trackers(self, stack: ExitStack, progress: Progress, plan: Plan) -> None:
        """Open the trackers on rank 0, none elsewhere; closed with `stack`. Collective."""

        def opened() -> Trackers:
            if self.ranks.rank != 0:
                return Trackers()
            return open_trackers(
                self.config,
                self.path,
                restored_step=progress.step,
                evaluated=_is_evaluated(progress, plan),
                wandb_id=progress.tracker_id,
                total_steps=plan.total_steps,
                stream=sys.stdout,
                warn=self.warn,
            )

        self._trackers = self.ranks.together(opened)

        def close(_kind: object, error: BaseException | None, _trace: object) -> None:
            code = 0 if error is None else getattr(error, "exit_code", 1)
            self._trackers.close(exit_code=code)

        stack.push(close)

    def went_back_to(self, step: int) -> int:
        """Count a return to `step`; returns how many there were."""
        self._returns[step] += 1
        return self._returns[step]

    def rewind(self, progress: Progress, plan: Plan) -> None:
        """Let the trackers forget what came after `progress`: the run went back."""
        self._trackers.rewind(progress.step, evaluated=_is_evaluated(progress, plan))
        self.progress = progress
        self.losses.clear()
        if self.ranks.rank == 0:
            self.folder.set_status("running", step=progress.step)

    def log(self, progress: Progress, plan: Plan, line: dict[str, float]) -> None:
        """Write one line of the training's numbers; a jump of the loss is reported."""
        self._trackers.log(self.stamp(progress, plan) | line)
        spike = self.losses.add(line["train/loss"])
        if spike is not None:
            self.warn(f"step {progress.step}: {spike}")
            self.folder.event("loss_spike", step=progress.step, reason=spike)

    def note(self, event: dict[str, Any]) -> None:
        """Record an event: `event`, `step` and whatever else; what it has to `say` is shown."""
        details = {k: v for k, v in event.items() if k not in ("event", "step", "say")}
        if event.get("say"):
            self.warn(event["say"])
        self.folder.event(event["event"], step=event["step"], **details)

    def note_culprits(self, step: int, culprits: list[Culprit]) -> None:
        """Record where a step stopped being finite."""
        told = [str(culprit) for culprit in culprits] or ["no rank could repeat it by itself"]
        self.blamed = "; ".join(told)
        self.warn(f"step {step} was skipped, its gradient is not finite: {self.blamed}")
        self.folder.event("not_finite", step=step, culprits=told)

    def stamp(self, progress: Progress, plan: Plan) -> dict[str, Any]:
        """Return what every line of metrics begins with."""
        record: dict[str, Any] = {
            "step": progress.step,
            "attempt": self.ranks.attempt,
            "time": time.time(),
            "epoch": round(plan.epoch(progress.step), 4),
            "train/learning_rate": learning_rate_in_force(
                progress.step - 1, progress.generation, self.config, plan
            ),
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
        self.warn_if_not_finite(progress.step, split, result)
        self._trackers.log(self.stamp(progress, plan) | {"eval/split": split} | named)

    def warn_if_not_finite(self, step: int, split: str, result: dict[str, float]) -> None:
        """Say so where an evaluation's loss is NaN or infinite, which no step's gradients show."""
        if math.isfinite(result["loss"]):
            return
        what = f"the loss on the {split} split is {result['loss']}"
        self.warn(
            f"step {step}: {what}: logits overflow, or the network's running statistics did. Lower "
            "optim.lr, or look at the images of this split"
        )
        self.folder.event("evaluation_not_finite", step=step, reason=what)

    def wants_save(self) -> bool:
        """Say whether rank 0 asks for a save at this boundary; tells what its thread met.

        Not collective: the other ranks learn of it in the packed reduction.
        """
        if self.saves is None:
            return False
        self.warn(*self.folder.take_news(), *self._trackers.take_news())
        return self.saves.wanted(self.progress.step if self.progress else 0)

    def save(self, parts: Parts, progress: Progress, meter: Meter, *, must: bool = True) -> None:
        """Save this step on rank 0 in the background. Not collective.

        After a skipped step it is that of a stop or the end, and the weights may be what skips the
        steps: no older checkpoint is deleted for them, and a rollback goes back to an older one.
        The state holds how many were skipped in a row, so that a resume counts on.

        Args:
            parts: what is saved.
            progress: its counters.
            meter: the sums since the last line.
            must: wait for a save that is still under way; otherwise this one is put off until
                that is over, and `wants_save` asks for it.
        """
        if self.saves is None:
            return
        progress.wall_sec += self.lap()
        self.folder.set_status("running", step=progress.step)
        best = progress.best_step if self.config.checkpoint.keep_best else None
        if self.saves.any_saved:
            self.states.drop_start()
        in_a_row = parts.guard.consecutive
        state = capture(parts, progress, meter, self.facts) | {SKIPPED_IN_A_ROW: in_a_row}
        self.saves.save(
            state, step=progress.step, best_step=best, must=must, keep_older=in_a_row > 0
        )

    def lap(self) -> float:
        """Return the seconds since the last call, or since the start."""
        now = time.monotonic()
        lap, self._started = now - self._started, now
        return lap


def _is_evaluated(progress: Progress, plan: Plan) -> bool:
    """Say whether no evaluation of this step is still to come."""
    return progress.evaluated_step == progress.step or not plan.eval_due(progress.step)
