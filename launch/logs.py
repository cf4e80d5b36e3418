"""`dist-train logs JOB`: the end of a job's output, and what is added to it."""

import contextlib
import sys
import time
from pathlib import Path

from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, print_error
from launch import scontrol
from launch.job_record import JobRecord
from launch.jobs import add_jobs_dir, records_of

LINES = 100
BYTES_OF_A_LINE = 1024  # how far from the end each line is looked for
LOOK_EVERY_SEC = 0.5
ASK_EVERY_SEC = 10.0  # whether the job is over
INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Run `dist-train logs`; returns 0, 2 for the user's mistake, 130 after Ctrl-C."""
    parser = Parser(prog="dist-train logs", description="Show the end of a job's output.")
    parser.add_argument("job", metavar="JOB", help="77, 77_3, or a run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job is over")
    parser.add_argument("-n", "--lines", type=int, default=LINES, help=f"how many ({LINES})")
    add_jobs_dir(parser)
    try:
        options = parser.parse_intermixed_args(argv)
        if options.lines < 0:
            raise ConfigError(f"--lines={options.lines} is out of range: give 0 or more")
        record = _one_of(records_of(options.jobs_dir, options.job))
        path = record.path(record.output)
        if not record.output or not (path.is_file() or options.follow):
            raise ConfigError(
                f"job {record.job_id} has written no output yet ({path}): wait for it with "
                f"dist-train logs -f {record.job_id}"
            )
        shown = _show_end(path, options.lines)
        if options.follow:
            _follow(record, path, shown)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _one_of(records: list[JobRecord]) -> JobRecord:
    """Return the only record; of a chain, the last one that has written something."""
    if len(records) > 1 and not records[0].chain:
        first, last = records[0].job_id, records[-1].job_id
        job = first.partition("_")[0]
        raise ConfigError(f"job {job} is an array of {first} to {last}: name one of them")
    begun = [record for record in records if record.path(record.output).is_file()]
    return begun[-1] if begun else records[0]


def _show_end(path: Path, num_lines: int) -> int:
    """Write the last lines; returns how many bytes of the file are told."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, 2)
        start = file.seek(max(0, end - num_lines * BYTES_OF_A_LINE))
        lines = file.read(end - start).splitlines(keepends=True)
    whole = lines[1:] if start else lines
    _write(b"".join(whole[max(0, len(whole) - num_lines) :]))
    return end


def _follow(record: JobRecord, path: Path, shown: int) -> None:
    """Write what is added to the output until the job is over."""
    asked, over = time.monotonic(), _is_over(record)
    while True:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(shown)
            added = file.read()
            shown += len(added)
            _write(added)
        if over:  # and that was what it wrote before it ended
            return
        if time.monotonic() - asked > ASK_EVERY_SEC:
            asked, over = time.monotonic(), _is_over(record)
        else:
            time.sleep(LOOK_EVERY_SEC)


def _is_over(record: JobRecord) -> bool:
    """Say whether SLURM says so; without an answer it is not."""
    with contextlib.suppress(scontrol.SlurmError):
        job = scontrol.job_of(record.job_id)
        return job is None or job.is_over
    return False


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
