"""`torchrun ... -m dist_train key=value ...`: check the configuration, then train."""

import os
import sys
import traceback

from dist_train.config.streams import open_standard_streams
from dist_train.preemption import (
    LAUNCHER_DIED,
    LAUNCHER_GONE,
    heard,
    listen_for_stop,
    stop_reason,
)


def main() -> int:
    """Run one rank; returns its exit code: 0 finished or saved, 2 the user's mistake, 93, 1."""
    open_standard_streams()
    with listen_for_stop():  # before what takes seconds to import: train() takes up what it hears
        return _main()


def _main() -> int:
    from dist_train.chain_status import ended_for_good
    from dist_train.config import ConfigError
    from dist_train.config.arguments import (
        let_another_speak,
        parse,
        print_error,
        refuse,
        stop_with_parent,
    )
    from dist_train.config.redact import redact

    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent(LAUNCHER_GONE)
    first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    try:
        request = parse(sys.argv[1:])
        if request.text is not None:
            if first:
                sys.stdout.write(request.text + "\n")
            return 0
        ended = None if request.dry_run else ended_for_good(request.config)
    except ConfigError as mistake:
        return refuse(str(mistake), 2, speak=first, asked_to_end=_asked)
    if ended is not None:
        return refuse(*ended, speak=first, asked_to_end=_asked)
    # Only now: torch takes a second to import, and a wrong key should not wait for it.
    from dist_train.distributed import RankFailedError
    from dist_train.dry_run import describe
    from dist_train.endings import LauncherDiedError
    from dist_train.launch_store import StoppedBeforeStartError
    from dist_train.saves import SaveFailedError
    from dist_train.step_failure import StepFailedError
    from dist_train.torchrun_store import tell_next_round
    from dist_train.train import train

    try:
        if not request.dry_run:
            train(request.config)
        elif first:
            sys.stdout.write(describe(request.config) + "\n")
    except ConfigError as mistake:
        return refuse(str(mistake), 2, speak=first, asked_to_end=_asked)
    except (StoppedBeforeStartError, LauncherDiedError) as stopped:
        if first:
            sys.stdout.write(f"{stopped}\n")
            sys.stdout.flush()
        stop = heard()
        if stopped.exit_code and stop is not None and stop.reason != LAUNCHER_DIED:
            tell_next_round(os.environ)
            stop.wait_for_torchrun()
        return stopped.exit_code
    except RankFailedError:
        let_another_speak(_asked)  # the rank that failed tells why
        return 1
    except BaseException as error:  # KeyboardInterrupt and SystemExit too: the run is not over
        code = getattr(error, "exit_code", 1)
        repeated = code != 1 and error.__cause__ is not None
        cause = error.__cause__ if repeated else error
        if isinstance(cause, StepFailedError):  # the same on all ranks: told once
            if repeated or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
                trace = "" if cause.users else cause.trace
                sys.stderr.write(redact(f"{trace}{cause}\n"))
            else:
                let_another_speak(_asked)
        elif isinstance(cause, SaveFailedError):
            print_error(str(cause))
        elif code == 1 or repeated:
            sys.stderr.write(redact("".join(traceback.format_exception(cause))))
        if code == 1:
            return 1
        return refuse(str(error), code, speak=first or repeated, asked_to_end=_asked)
    return 0


def _asked() -> bool:
    return stop_reason() is not None


if __name__ == "__main__":
    sys.exit(main())
