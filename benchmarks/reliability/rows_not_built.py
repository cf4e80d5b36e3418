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
    Row(
        id="N1",
        promise="a short cut of the network is survived, a long one is noticed within 10 s, and "
        "the run resumes when it heals; delay and loss change no bit",
        injection="cuts of 3 s and 60 s, 100 ms delay, 5 % loss between network namespaces",
        num_trials=10,
    ),
    Row(
        id="O2",
        promise="a loader worker killed for memory is named and recovered from like a dead rank",
        injection="the kernel kills a loader worker in a small cgroup",
        num_trials=10,
        needs="a control group of its own with a limit of memory",
    ),
)
