"""Rows that have no trial: their promise stands in the table with what is missing."""

from benchmarks.reliability.row import Row

ROWS = (
    Row(
        id="P3",
        promise="a job that SLURM stops and requeues three times is one continuous run, bitwise",
        injection="time limit, requeue, resume on a real SLURM",
        num_trials=10,
        needs="a real SLURM cluster",
    ),
)
