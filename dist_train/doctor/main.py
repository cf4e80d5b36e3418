"""`dist-train doctor`: examine this machine, or every node of the SLURM step that it is run in.

    dist-train doctor                                           this machine, one process
    dist-train doctor --nproc 8                                 this machine, as many ranks
    srun --nodes=2 --ntasks-per-node=8 dist-train doctor        an allocation

Exit code: 0 healthy, 1 a problem was found, 2 a mistake on the command line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, print_error
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.doctor.deadline import any_left
from dist_train.doctor.diagnosis import diagnose
from dist_train.doctor.examination import Examination
from dist_train.doctor.report import PROBLEMS, as_json, as_text, exit_code_of
from dist_train.doctor.stages import LeftAloneError
from dist_train.layout import Layout, detect_layout
from dist_train.torchrun_here import ALONE, without_leftovers

WAIT_SEC = 60.0
TOTAL_SEC = 900.0  # beyond the wait: longer than all stages' deadlines
# A file in which rank 0 leaves the exit code: torchrun keeps none.
CODE_FILE_VARIABLE = "DIST_TRAIN_DOCTOR_CODE"


def main(argv: list[str]) -> int:
    """Run `dist-train doctor`; returns 0 healthy, 1 problems, 2 the user's mistake."""
    rank = 0
    try:
        layout = detect_layout(os.environ, parent=os.getppid())
        rank = layout.rank
        options = _parse(argv)
        if options.nproc is not None and layout.launcher != "single":
            raise ConfigError(
                f"--nproc={options.nproc} starts ranks on this machine, but {layout.launcher} has "
                "started them already: leave it out"
            )
    except ConfigError as mistake:
        if rank == 0:
            print_error(str(mistake))
        return 2
    if options.nproc is not None:
        return _start_ranks(options)
    most = options.wait + TOTAL_SEC
    timer = threading.Timer(most, _give_up, args=(most,))
    timer.daemon = True
    timer.start()
    code = _examine(layout, options)
    timer.cancel()
    if any_left():  # it may never return, and would be waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dist-train doctor",
        description="Examine this machine; under srun or torchrun, every node that takes part.",
    )
    parser.add_argument("--nproc", type=int, help="start as many ranks on this machine")
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are to be")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer measurements")
    parser.add_argument(
        "--wait", type=float, default=WAIT_SEC, help="seconds that ranks may take to come (60)"
    )
    options = parser.parse_args(argv)
    if options.nproc is not None and options.nproc < 1:
        raise ConfigError(f"--nproc={options.nproc} must be 1 or more")
    if not 0 < options.wait < 86400:
        raise ConfigError(f"--wait={options.wait} must be more than 0 s and less than a day")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json={options.json}: there is no folder {options.json.parent}")
    return options


def _examine(layout: Layout, options: argparse.Namespace) -> int:
    try:
        facts = Examination(
            layout, options.run_dir.absolute(), wait_sec=options.wait, quick=options.quick
        ).run()
    except LeftAloneError as alone:
        print_error(str(alone))
        return PROBLEMS
    if facts is None:
        return 0  # rank 0 tells
    sections = diagnose(facts)
    code = exit_code_of(sections)
    sys.stdout.write(as_text(facts, sections))
    sys.stdout.flush()
    if options.json is not None:
        try:
            write_atomically(options.json, as_json(facts, sections))
        except OSError as error:
            print_error(f"--json={options.json} cannot be written: {error.strerror}")
            code = 2
    code_file = os.environ.get(CODE_FILE_VARIABLE)
    if code_file is None:
        return code
    write_atomically(Path(code_file), json.dumps({"code": code}))
    return 0


def _start_ranks(options: argparse.Namespace) -> int:
    """Start ranks on this machine through torchrun, and return rank 0's exit code."""
    share = max(1, len(os.sched_getaffinity(0)) // options.nproc)
    command = [sys.executable, "-m", "torch.distributed.run", *ALONE]
    command += [f"--nproc-per-node={options.nproc}", "-m", "dist_train.doctor.main"]
    command += [f"--run-dir={options.run_dir}", f"--wait={options.wait}"]
    command += ["--quick"] if options.quick else []
    command += [f"--json={options.json}"] if options.json is not None else []
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        code_file = Path(folder) / "code.json"
        variables = {"OMP_NUM_THREADS": str(share)} | os.environ
        variables |= {CODE_FILE_VARIABLE: str(code_file)}
        subprocess.call(command, env=without_leftovers(variables, num_nodes=1))
        return read_json(code_file).get("code", PROBLEMS)


def _give_up(seconds: float) -> None:
    """End a process whose examination takes impossibly long."""
    print_error(f"the doctor has not come to an end within {seconds:.0f} s, and is ended")
    os._exit(PROBLEMS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
