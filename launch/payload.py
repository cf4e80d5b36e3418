"""What submitit pickles at submission and calls on the job's first node."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launch.job_record import GitState
from launch.submitted_code import changes_since


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Runs the body of the job, and ends the process with its exit code.

    submitit would turn an exception into its own report and a return value into a file; neither
    is the job's exit code.
    """

    start: tuple[str, ...]  # the command that starts the ranks
    words: tuple[str, ...]  # theirs
    jobs_dir: str
    git: tuple[GitState, ...] = ()  # of the code when it was submitted; empty: there is a copy

    def __call__(self) -> NoReturn:
        """Start the ranks, restart or requeue them, end."""
        from launch.batch import run_job

        for sentence in changes_since(self.git, Path(self.jobs_dir)):
            sys.stdout.write(f"dist-train: warning: {sentence}\n")
        sys.stdout.flush()
        sys.exit(run_job(list(self.start), list(self.words)))
