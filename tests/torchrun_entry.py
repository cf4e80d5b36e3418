"""`python -m dist_train` with one fault an attempt: TEST_FAULTS is a JSON list of them."""

import json
import os
import sys
from contextlib import ExitStack

from dist_train.__main__ import main
from tests.faults import Fault, arm

if __name__ == "__main__":
    faults = json.loads(os.environ.get("TEST_FAULTS", "[]"))
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    with ExitStack() as stack:
        if attempt < len(faults) and int(os.environ["RANK"]) == faults[attempt]["rank"]:
            arm(Fault(**faults[attempt]), stack)
        code = main()
    sys.exit(code)
