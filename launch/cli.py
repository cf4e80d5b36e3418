"""`dist-train VERB ...`: a verb is one module, imported when it is asked for."""

import importlib
import sys

from dist_train.config.streams import open_standard_streams

VERBS = {
    "run": ("launch.local", "start the ranks of a training on this machine and wait for them"),
    "submit": ("launch.submit", "submit a training, or a sweep of them, to SLURM"),
    "jobs": ("launch.jobs", "how submitted jobs stand; compare the elements of a sweep"),
    "logs": ("launch.logs", "the end of a job's output, and what is added to it"),
    "cancel": ("launch.cancel", "let a job's ranks save and end, and end the job"),
    "requeue": ("launch.requeue", "put a job into the queue again, with no failures counted"),
    "batch": ("launch.batch", "the body of a batch job: ranks, restarts, requeue"),
    "replay": ("dist_train.replay", "run a batch that was not finite again, and see where"),
    "checkpoint": ("dist_train.checkpoint_tool", "list, verify and show the checkpoints of a run"),
    "doctor": (
        "dist_train.doctor.main",
        "is this machine, or this allocation, fit for a training?",
    ),
    "bench": (
        "dist_train.bench.main",
        "how fast on 1, 2, 4 ... ranks, and where the rest of the time goes",
    ),
    "verify-resume": (
        "dist_train.verify_resume",
        "kill and resume your configuration: are the bits those of an unbroken run?",
    ),
}


def main() -> int:
    """Run the verb of the command line; returns the exit code."""
    open_standard_streams()
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {verb:<14} {what}" for verb, (_, what) in VERBS.items()]
        sys.stdout.write("usage: dist-train VERB ...\n\n" + "\n".join(lines) + "\n")
        return 0 if words else 2
    if words[0] == "--version":
        from dist_train import __version__

        sys.stdout.write(f"dist-train {__version__}\n")
        return 0
    if words[0] not in VERBS:
        known = ", ".join(VERBS)
        sys.stderr.write(f"dist-train: error: no verb {words[0]!r}: choose one of {known}\n")
        return 2
    module = importlib.import_module(VERBS[words[0]][0])
    return module.main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
