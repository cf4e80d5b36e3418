"""`python -m dist_train` with a fault of its own: FAULT is `how rank step mark`, first try only."""

import os
import sys
from contextlib import ExitStack

from benchmarks.reliability.faults_inside import Death
from dist_train.__main__ import main

if __name__ == "__main__":
    how, rank, step, mark = os.environ["FAULT"].split(" ", 3)
    with ExitStack() as stack:
        if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            Death(rank=int(rank), step=int(step), how=how, mark=mark).arm(stack)
        code = main()
    sys.exit(code)
