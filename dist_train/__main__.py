"""`torchrun ... -m dist_train key=value ...`: check the configuration, then train."""

import os
import sys
import traceback

from dist_train.config import ConfigError
from dist_train.config.arguments import let_another_speak, parse, refuse


def main() -> int:
    """Run one rank; returns its exit code: 0 finished or saved, 2 the user's mistake, 93, 1."""
    first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
    try:
        request = parse(sys.argv[1:])
    except ConfigError as mistake:
        return refuse(str(mistake), 2, speak=first)
    if request.text is not None:
        if first:
            sys.stdout.write(request.text + "\n")
        return 0
    # Only now: torch takes a second to import, and a wrong key should not wait for it.
    from dist_train.distributed import RankFailedError
    from dist_train.dry_run import describe
    from dist_train.train import train

    try:
        if not request.dry_run:
            train(request.config)
        elif first:
            sys.stdout.write(describe(request.config) + "\n")
    except ConfigError as mistake:
        return refuse(str(mistake), 2, speak=first)
    except RankFailedError:
        let_another_speak()  # the rank that failed tells why
        return 1
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        if code == 1:
            traceback.print_exc()
            return 1
        return refuse(str(error), code, speak=first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
