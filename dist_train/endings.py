"""How a run ends: finished, stopped and saved, stopped before it began, or failed with a cause."""

import contextlib
from typing import Any

from dist_train import chain
from dist_train.chain import Cause
from dist_train.config import ConfigError
from dist_train.data.loaders import Data
from dist_train.failure import RepeatedFailureError, is_follower
from dist_train.preemption import LAUNCHER_DIED
from dist_train.progress import Progress
from dist_train.run import Run
from dist_train.saves import END_RETRY_SEC, STOP_RETRY_SEC, SaveFailedError
from dist_train.state import Parts
from dist_train.step_failure import StepFailedError
from dist_train.summary import make_summary, table


class LauncherDiedError(RuntimeError):
    """A torchrun died, and those of other machines live: they start their ranks again."""

    exit_code = 1


def end_preempted(run: Run, progress: Progress, reasons: list[str | None]) -> dict[str, Any]:
    """Record that the run was stopped and saved. Not collective.

    Args:
        run: the run.
        progress: where it stopped.
        reasons: why each rank was asked to, or None.

    Raises:
        SaveFailedError: it could not be saved.
        LauncherDiedError: it was no wish: some ranks have lost their launcher, others have not.
    """
    rank, reason, is_loss = _wish(reasons)
    run.ranks.pulse.enter("checkpoint")
    why = f"{reason} on rank {rank}"
    if run.saves is not None:
        told = f"the run was asked to stop ({why})"
        run.saves.finish(progress.step, told, retry_sec=STOP_RETRY_SEC)
    if is_loss:
        raise _launcher_died(run, rank, progress.step, "saved")
    run.folder.event("preempted", step=progress.step, reason=why)
    run.folder.set_status("preempted", step=progress.step, exit_code=0, reason=why)
    told = f"stopped at step {progress.step} ({why}) and saved: the same command continues"
    run.say(told, last=True)
    return {"state": "preempted", "steps": progress.step, "run_dir": str(run.folder.given)}


def end_unstarted(run: Run, reasons: list[str | None]) -> dict[str, Any]:
    """Record that the run was stopped before anything was loaded. Not collective.

    Raises:
        LauncherDiedError: it was no wish: some ranks have lost their launcher, others have not.
    """
    rank, reason, is_loss = _wish(reasons)
    why, step = f"{reason} on rank {rank}", run.folder.read_status().get("step", 0)
    if is_loss:
        raise _launcher_died(run, rank, step, "nothing to save")
    run.folder.set_status("preempted", step=step, exit_code=0, reason=why)
    run.say(f"stopped before the start ({why}): the same command continues")
    return {"state": "preempted", "steps": step, "run_dir": str(run.folder.given)}


def _wish(reasons: list[str | None]) -> tuple[int, str, bool]:
    """Return the rank that asked to stop and why, and whether it is rather a launcher's loss."""
    told = [(rank, text) for rank, text in enumerate(reasons) if text is not None]
    rank, reason = next((x for x in told if x[1] != LAUNCHER_DIED), told[0])
    return rank, reason, reason == LAUNCHER_DIED and None in reasons


def _launcher_died(run: Run, rank: int, step: int, saved: str) -> LauncherDiedError:
    """Record that a rank's launcher died; returns what to raise."""
    cause = Cause(
        attempt=run.ranks.attempt,
        rank=rank,
        step=step,
        kind="death",
        message=f"lost its launcher ({LAUNCHER_DIED})",
    )
    if run.ranks.rank == 0:
        with contextlib.suppress(OSError):  # the disk may be full
            chain.record(run.path, run.ranks.chain, cause)
    run.folder.event("failed", step=step, reason=cause.sentence())
    run.folder.set_status("failed", step=step, exit_code=1, reason=cause.sentence())
    return LauncherDiedError(
        f"{cause.sentence()}; {saved}: start that torchrun again, the others wait for it"
    )


def end_finished(
    run: Run, parts: Parts, progress: Progress, data: Data, result: dict[str, float]
) -> dict[str, Any]:
    """Write the summary, print its table and record that the run is over. Not collective.

    Raises:
        SaveFailedError: the last checkpoint, and with it the weights, could not be saved.
    """
    run.ranks.pulse.enter("checkpoint")
    progress.wall_sec += run.lap()
    run.warn_if_not_finite(progress.step, "test", result)
    if parts.ema is not None:
        parts.ema.swap()  # the average is what was evaluated
    summary = make_summary(parts, progress, data, result, run.facts["device"])
    summary["run_dir"] = str(run.folder.given)
    if run.saves is not None:
        try:
            run.saves.finish(progress.step, "the run is over", retry_sec=END_RETRY_SEC)
        except SaveFailedError:
            run.say(table(summary), last=True)
            raise
    run.ranks.pulse.end()
    run.folder.write_summary(summary)
    run.folder.event("finished", step=progress.step)
    run.folder.set_status("finished", step=progress.step, exit_code=0)
    run.say(table(summary), last=True)
    return summary


def end_failed(run: Run, error: BaseException) -> Exception | None:
    """Record why this attempt failed; the first rank to do so is believed. Not collective.

    Returns:
        What to raise instead: the first cause of another rank, or the end of the chain.
    """
    if isinstance(error, LauncherDiedError):
        return None  # recorded already
    if isinstance(error, StepFailedError) and run.ranks.rank != 0:
        return None  # the same on all ranks: rank 0, which has the folder, records it
    now = run.folder.read_status()
    step = run.progress.step if run.progress else now.get("step", 0)
    code, reason = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
    instead: Exception | None = None
    if is_follower(error):
        instead = run.chain.follow(error, step)
        code, reason = 1, str(instead)
    elif code == 1 and (line := run.chain.first_cause(error, step)) is not None:
        instead = RepeatedFailureError(line)
        code, reason = chain.EXIT_CODE, line
    now = run.folder.read_status()
    mine = (now.get("chain"), now.get("attempt")) == (run.ranks.chain, run.ranks.attempt)
    if (now.get("state") == "failed" and mine) or not run.path.is_dir():
        return instead
    if now.get("state") == "finished" and isinstance(error, ConfigError):
        return None  # a wrong command does not undo a finished run
    with contextlib.suppress(OSError):  # the disk may be the reason
        run.folder.set_status("failed", step=step, exit_code=code, reason=reason)
        run.folder.event("failed", step=step, reason=reason)
    return instead
