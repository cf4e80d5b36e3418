"""Rows R5 and R7: kills upon kills."""

import signal
import time

from benchmarks.reliability.in_torchrun import launched, send, time_of_attempt
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD, LONG, STEPS, check_end


def r5(trial: Trial) -> float | None:
    """A storm: random ranks are killed at the times of a Poisson process until the run ends."""
    minutes = trial.options.minutes or 30.0
    mean_sec = trial.options.mean_sec
    sizes = ("model.args.width=24", "data.args.image_size=24", "train.global_batch_size=48")
    tried = 200 if minutes < 10.0 else 2000  # the first hundreds are slower than the rest
    probe = trial.clean.of(
        2, (*HARD, *sizes, f"train.steps={tried}", f"checkpoint.every_steps={tried}")
    )
    steps = max(30, int(0.85 * 60 * minutes / (probe.train_sec / tried)))
    every = max(1, int(2.0 / (probe.train_sec / tried)))  # a save every two seconds
    words = (*HARD, *sizes, f"train.steps={steps}", f"checkpoint.every_steps={every}")
    words += ("eval.every_epochs=null",)
    clean = trial.clean.of(2, words, timeout_sec=200.0 * minutes + 120.0)
    kills, begin = 0, time.monotonic()
    with launched(trial, words, nproc=2, max_restarts=10_000, launcher="dist-train") as tree:
        tree.wait_for_ranks(2)
        due = time.monotonic() + trial.dice.expovariate(1.0 / mean_sec)
        while tree.process.poll() is None:
            # The storm is over after twice its time: only a run that makes no headway sees that.
            if due <= time.monotonic() < begin + 120.0 * minutes:
                ranks = tree.ranks()
                if ranks:
                    kills += send(trial.dice.choice(sorted(ranks.values())), signal.SIGKILL)
                due += trial.dice.expovariate(1.0 / mean_sec)
            check(
                time.monotonic() - begin < 60.0 * 4.0 * minutes + 120.0,
                f"not done after {time.monotonic() - begin:.0f} s, {kills} kills: {tree.tail()}",
            )
            time.sleep(0.02)
        wall = time.monotonic() - begin
        trial.fired, trial.faults = kills > 0, 1
        trial.notes |= {
            "kills": kills,
            "mean_sec": mean_sec,
            "wall_sec": round(wall, 1),
            "clean_sec": round(clean.train_sec, 1),
            "steps": steps,
            "ettr": round(clean.train_sec / wall, 4),
        }
        check_end(trial, tree, 2, words)
    target = 0.75 if mean_sec >= 60.0 and minutes >= 30.0 else 0.0
    ettr = clean.train_sec / wall
    check(ettr >= target, f"useful share of the time {ettr:.1%}, wanted {target:.0%}")
    return wall


def r7(trial: Trial) -> float | None:
    """A second kill while the first is being recovered from."""
    with launched(trial, LONG, nproc=3, max_restarts=3) as tree:
        first = tree.wait_for_ranks(3)
        step = trial.dice.randrange(1, STEPS - 30)
        tree.wait_for_step(step)
        trial.notes["step"] = step
        check(send(first[trial.dice.randrange(3)], signal.SIGKILL), "nothing to kill")
        second = tree.wait_for_ranks(3, but=frozenset(first.values()))
        until = time.monotonic() + trial.dice.uniform(0.0, 8.0)
        while time.monotonic() < until and time_of_attempt(tree.run_dir, 1) is None:
            time.sleep(0.01)
        now = time.time()
        trial.notes["steps_begun"] = time_of_attempt(tree.run_dir, 1) is not None
        trial.fired = send(second[trial.dice.randrange(3)], signal.SIGKILL)
        check_end(trial, tree, 3, LONG)
    back = time_of_attempt(tree.run_dir, 2)
    return None if back is None else back - now


ROWS = (
    Row(
        id="R5",
        promise="a run under a storm of kills completes bitwise, at least 75 % of its time useful",
        injection="Poisson kills of random ranks, one a minute for 30 minutes",
        num_trials=1,
        measures="the whole run",
        work=r5,
        small=0,
        limit_sec=10_800.0,
    ),
    Row(
        id="R7",
        promise="a second kill during the recovery from the first changes nothing",
        injection="kill -9 of a rank, then of a restarted one while it starts",
        num_trials=20,
        measures="from the second kill to the next step",
        work=r7,
    ),
)
