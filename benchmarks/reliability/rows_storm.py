"""Rows R5 and R7: kills upon kills."""

import signal
import time

from benchmarks.reliability.clean import status_of
from benchmarks.reliability.in_ranks import how_it_ended, last_step, trained
from benchmarks.reliability.in_torchrun import launched, send, time_of_attempt
from benchmarks.reliability.row import Row, Trial, check
from benchmarks.reliability.rows_crash import HARD, LONG, STEPS, check_end
from tests.settings import small

PROBE = 300  # steps that tell how long an undisturbed one takes
SAVE_EVERY_SEC = 2.0
UNENDING = 100_000_000
# Steps of 0.1 s that leave the cores free, as on a GPU: four micro-batches, each of which waits.
# The result does not depend on the wait: the undisturbed run that it is compared with has none.
PACED = (*HARD, "model.factory=tests.nets:paced_net", "train.global_batch_size=48")
PACED += ("optim.schedule=constant", "eval.every_epochs=null")  # weights do not know the last step
SLOW, QUICK = "model.args.sec=0.025", "model.args.sec=0.0"


def r5(trial: Trial) -> float | None:
    """A storm: random ranks are killed at the times of a Poisson process; then a stop."""
    minutes = trial.options.minutes or 30.0
    mean_sec = trial.options.mean_sec
    saves = f"checkpoint.every_steps={int(SAVE_EVERY_SEC / 0.1)}"
    probe = trial.clean.of(2, (*PACED, SLOW, saves, f"train.steps={PROBE}"))
    step_sec = probe.train_sec / (PROBE - 1)
    words = (*PACED, SLOW, saves, f"train.steps={UNENDING}")
    kills, begin = 0, time.monotonic()
    end = begin + 60.0 * minutes
    with launched(trial, words, nproc=2, max_restarts=10_000, launcher="dist-train") as tree:
        tree.wait_for_ranks(2)
        due = time.monotonic() + trial.dice.expovariate(1.0 / mean_sec)
        while time.monotonic() < end:
            check(tree.process.poll() is None, f"ended early: {tree.tail()}")
            if due <= time.monotonic():
                ranks = tree.ranks()
                if ranks:
                    kills += send(trial.dice.choice(sorted(ranks.values())), signal.SIGKILL)
                due += trial.dice.expovariate(1.0 / mean_sec)
            time.sleep(0.02)
        tree.wait_for_ranks(2)  # the last kill may be recovered from just now
        tree.wait_for_step(last_step(tree.run_dir) + 1)
        send(tree.process.pid, signal.SIGTERM)
        code = tree.wait()
        wall = time.monotonic() - begin
        check(code == 0, f"the launcher ended with {code}: {tree.tail()}")
        orphans = tree.orphans()
        check(not orphans, f"processes are left: {orphans}")
    stopped = status_of(tree.run_dir)
    check(stopped.get("state") == "preempted", f"not stopped: {stopped}")
    steps = stopped["step"]
    ettr = steps * step_sec / wall
    trial.fired, trial.faults = kills > 0, 1
    trial.notes |= {
        "kills": kills,
        "mean_sec": mean_sec,
        "wall_sec": round(wall, 1),
        "step_sec": round(step_sec, 4),
        "steps": steps,
        "ettr": round(ettr, 4),
    }
    # The same command, asked for just the steps that it has, ends as a finished run.
    config = small(tree.run_dir, *PACED, SLOW, saves, f"train.steps={steps}")
    ends = trained(trial.folder, config, world_size=2)
    check(ends[0].error is None, how_it_ended(ends, trial.folder))
    quick = (*PACED, QUICK, saves, f"train.steps={steps}")
    trial.clean.of(2, quick, timeout_sec=60.0 * minutes + 60.0)
    difference = trial.clean.difference(tree.run_dir, 2, quick)
    check(difference is None, str(difference))
    target = 0.75 if mean_sec >= 60.0 and minutes >= 30.0 else 0.0
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
        injection="Poisson kills of random ranks, one a minute for 30 minutes; steps of 0.1 s",
        num_trials=1,
        measures="the storm",
        work=r5,
        small_minutes=0.5,
        limit_sec=7200.0,
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
