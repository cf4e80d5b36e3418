"""May this command continue this folder? The lock, the settings and the status decide."""

import contextlib
from collections.abc import Iterator
from typing import Any

from dist_train.config import Config, ConfigError
from dist_train.config.identity import check_same_run, length_of, run_dir_of
from dist_train.distributed import Ranks
from dist_train.run import Run
from dist_train.run_folder import RunFolder, read_json
from dist_train.summary import table

FINAL_CODES = (2, 93)  # of status.json: a restart of the same chain would only repeat them


class EarlierFailureError(RuntimeError):
    """This chain has ended for good before; a restart has nothing to do."""

    exit_code = 1  # that of the earlier end


@contextlib.contextmanager
def open_run(config: Config, ranks: Ranks) -> Iterator[Run]:
    """Claim the run's folder on rank 0 and check that this command may continue it. Collective.

    Raises:
        ConfigError: not writable, in use, or a run with other settings; on all ranks.
        EarlierFailureError: this chain of restarts has already ended for good.
    """
    folder = RunFolder(run_dir_of(config), ranks)
    run = Run(config, folder, ranks)
    try:
        run.finished, earlier = ranks.from_first(lambda: _claim(run))
        if earlier is not None:
            ended = EarlierFailureError(
                "this run ended before, and a restart would only repeat it: "
                f"{earlier.get('reason')}"
            )
            ended.exit_code = earlier["exit_code"]
            raise ended
        try:
            yield run
        except Exception as error:
            run.failed(error)
            raise
    finally:
        folder.release()


def _claim(run: Run) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Lock, compare and start the folder. Rank 0 only.

    Returns:
        (the summary of a run that is finished, the status of a chain that ended for good).
    """
    config, folder, ranks = run.config, run.folder, run.ranks
    folder.claim()
    run.say(f"run folder: {folder.path}")
    status = folder.read_status()
    restarted = ranks.attempt > 0 and status.get("chain") == ranks.chain
    if restarted and status.get("exit_code") in FINAL_CODES:
        return None, status
    saved = folder.saved_config()
    has_checkpoints = folder.checkpoints.is_dir() and any(folder.checkpoints.glob("step_*"))
    if saved is not None and has_checkpoints:
        check_same_run(config, saved, folder.path)
        if config.resume == "never" and not restarted:
            raise ConfigError(
                f"resume=never, but {folder.path} holds checkpoints: choose another run_dir, or "
                "delete the folder to train from the start"
            )
        before, now = length_of(saved), length_of(config)
        if before == now and status.get("state") == "finished":
            summary = read_json(folder.path / "summary.json")
            if summary:
                run.say(f"this run is finished; ask for more than {now} to continue it")
                run.say(table(summary))
                return summary, None
        if before != now:
            run.warn(
                f"the length changes from {before} to {now}: the learning-rate schedule is that "
                "of the new length from the resumed step on"
            )
            folder.event("length_changed", step=status.get("step", 0), before=before, now=now)
    return None, None
