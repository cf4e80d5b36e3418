"""May this command continue this folder? The lock, the settings and the status decide."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.chain import begin
from dist_train.chain_status import earlier_end, has_ended
from dist_train.checkpoint_folder import list_checkpoints, newest_step
from dist_train.config import Config, ConfigError
from dist_train.config.identity import as_begun, length_of, run_dir_of
from dist_train.config.redact import learn
from dist_train.config.typed import flatten
from dist_train.config.whole_file import read_json
from dist_train.distributed import Ranks
from dist_train.endings import end_failed, end_unstarted
from dist_train.failure import ChainNotes, stack_on_crash
from dist_train.imported_code import changes_of_code, code_on_disk
from dist_train.layout import elastic_nodes
from dist_train.preemption import LAUNCHER_DIED, stop_reason
from dist_train.run import Run
from dist_train.run_folder import RunFolder
from dist_train.summary import table


class EarlierFailureError(RuntimeError):
    """This chain has ended for good before; a restart has nothing to do."""

    exit_code = 1  # that of the earlier end


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What rank 0 found in the folder, for all ranks."""

    finished: dict[str, Any] | None = None  # the summary of a run that is over
    ended: tuple[str, int] | None = None  # this chain ended for good: reason, exit code
    micro_batch_size: int | None = None  # that this chain remembers
    config: Config | None = None  # what the command means for this run, if it goes on


@contextlib.contextmanager
def open_run(config: Config, ranks: Ranks) -> Iterator[Run]:
    """Claim the run's folder on rank 0 and check that this command may continue it. Collective.

    Raises:
        ConfigError: not writable, in use, or a run with other settings; on all ranks.
        EarlierFailureError: this chain of restarts has already ended for good.
        RankFailedError: another rank failed; it tells why.
    """
    learn(config)
    folder = RunFolder(run_dir_of(config), ranks)
    run = Run(config, folder, ranks)
    try:
        claim = ranks.from_first(lambda: _claim(run))
        if claim.ended is not None:
            ended = EarlierFailureError(claim.ended[0])
            ended.exit_code = claim.ended[1]
            raise ended
        run.config = claim.config or run.config
        run.finished = claim.finished
        run.chain = ChainNotes(run.path, ranks, claim.micro_batch_size)
        with stack_on_crash(run.path, ranks):
            try:
                if run.finished is None and ranks.any(stop_reason() is not None):
                    run.finished = end_unstarted(run, ranks.gather(stop_reason()))
                yield run
            except BaseException as error:
                instead = end_failed(run, error)
                if instead is None:
                    raise
                raise instead from error
    finally:
        folder.release()


def _claim(run: Run) -> Claim:
    """Lock, compare and start the folder. Rank 0 only."""
    config, folder, ranks = run.config, run.folder, run.ranks
    folder.claim()
    run.say(f"run folder: {folder.given}")
    how_many = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
    run.say(f"{how_many}, started by {ranks.started_by}")
    elastic = elastic_nodes(os.getppid(), os.environ) if ranks.launcher == "torchrun" else None
    if elastic is not None:
        run.warn(
            f"torchrun may change the number of nodes (--nnodes={elastic}): ranks cannot join or "
            "leave a running attempt, they save and stop. Give a fixed --nnodes; the same command "
            "continues on any number of nodes"
        )
    status = folder.read_status()
    if has_ended(status, ranks.chain, ranks.attempt):
        return Claim(ended=(earlier_end(str(status.get("reason"))), status["exit_code"]))
    restarted = ranks.attempt > 0 and status.get("chain") == ranks.chain
    saved = folder.saved_config()
    if saved is not None and list_checkpoints(folder.checkpoints):
        config = as_begun(config, saved, folder.path)
        _tell_what_is_kept(run, config)
        if config.resume == "never" and not restarted:
            raise ConfigError(
                f"resume=never, but {folder.path} holds checkpoints: choose another run_dir, or "
                "delete the folder to train from the start"
            )
        _tell_other_root(run, saved)
        before, now = length_of(saved), length_of(config)
        if before == now and status.get("state") == "finished":
            summary = read_json(folder.path / "summary.json")
            stopped_early = bool(summary.get("early_stopped"))
            if summary and not (stopped_early and _is_more_patient(config, saved)):
                more = run.more_patience if stopped_early else f"ask for more than {now}"
                run.say(f"this run is finished; to continue it {more}")
                _tell_changed_code(run)
                run.say(table(summary))
                return Claim(finished=summary)
        if before != now:
            run.warn(
                f"the length changes from {before} to {now}: the learning-rate schedule is that "
                "of the new length from the resumed step on"
            )
            folder.event("length_changed", step=status.get("step", 0), before=before, now=now)
    run.earlier = folder.note_earlier_attempt()  # before status.json is written anew
    return _begin(run, status)


def _tell_other_root(run: Run, saved: Config) -> None:
    """Say that the command names another folder of data than the run was trained on."""
    before, now = saved.data.root, run.config.data.root
    if before is None or now is None or Path(before).resolve() == Path(now).resolve():
        return
    run.warn(
        f"this is a run on data.root={before}, and the command says {now}: if those are other data "
        f"give them a run of their own, with run_dir={_unused(run.path)}"
    )


def _unused(path: Path) -> Path:
    """Return a folder beside `path` that does not exist."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(folder for folder in numbered if not folder.exists())


def _tell_changed_code(run: Run) -> None:
    """Say which code is not that of the finished run, whose results are about to be shown."""
    before = run.folder.code()
    changes = changes_of_code(before, code_on_disk(run.config, before))
    if not changes:
        return
    run.warn(
        f"since this run was finished {', '.join(changes)}: the results below are of the code "
        f"before; to train anew add run_dir={_unused(run.path)} to the command"
    )


def _tell_what_is_kept(run: Run, config: Config) -> None:
    """Say which settings the run keeps where this command would now mean others, and take them."""
    given, kept = flatten(run.config), flatten(config)
    told = ", ".join(f"{key}={kept[key]}" for key in kept if kept[key] != given[key])
    if told:
        run.say(f"what the command leaves open is as this run was begun: {told}")
    run.config = config


def _is_more_patient(config: Config, saved: Config) -> bool:
    """Say whether a run that early stopping ended with `saved` goes on with `config`."""
    now, before = config.train.early_stop_patience, saved.train.early_stop_patience
    return now is None or (before is not None and now > before)


def _begin(run: Run, status: dict[str, Any]) -> Claim:
    """Count how the attempts before this one ended; end the chain if it is of no use."""
    ranks, step = run.ranks, newest_step(run.folder.checkpoints)
    beginning = begin(
        run.path,
        chain=ranks.chain,
        attempt=ranks.attempt,
        world_size=ranks.world_size,
        step=step,
        stopped=status.get("chain") == ranks.chain and _was_asked_to_stop(status),
        told=_reason_of(status, ranks),
    )
    if beginning.refusal is not None:
        run.folder.set_status("failed", step=step, exit_code=93, reason=beginning.refusal)
        return Claim(ended=(beginning.refusal, 93))
    if status.get("state") != "finished":  # a wrong command does not undo that
        run.folder.set_status("running", step=step)
    if beginning.earlier is not None:
        wait = min(beginning.wait_sec, run.config.parallel.start_timeout_sec / 3)
        later = f", in {wait:.0f} s" if wait else ""
        run.warn(f"restart {ranks.attempt} from step {step}{later}: {beginning.earlier}")
        run.folder.event("restarted", step=step, reason=beginning.earlier, wait_sec=wait)
        end = time.monotonic() + wait
        while time.monotonic() < end and stop_reason() is None:
            time.sleep(0.05)
    return Claim(micro_batch_size=beginning.micro_batch_size, config=run.config)


def _was_asked_to_stop(status: dict[str, Any]) -> bool:
    """Say whether the attempt before was; its launcher's death is no wish, though it has saved."""
    reason = str(status.get("reason"))
    return status.get("state") == "preempted" and not reason.startswith(LAUNCHER_DIED)


def _reason_of(status: dict[str, Any], ranks: Ranks) -> str | None:
    """Return what is known of the end of the attempt before, if no rank failed by itself."""
    before = (status.get("chain"), status.get("attempt")) == (ranks.chain, ranks.attempt - 1)
    hung = status.get("state") == "failed" and status.get("exit_code") is None
    lost = status.get("state") == "preempted" and not _was_asked_to_stop(status)
    return status.get("reason") if before and (hung or lost) else None
