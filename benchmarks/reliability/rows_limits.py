"""Row R6: attempts that end the same way again and again."""

import time

from benchmarks.reliability.clean import status_of
from benchmarks.reliability.in_ranks import called, how_it_ended
from benchmarks.reliability.in_torchrun import launched
from benchmarks.reliability.row import Row, Trial, check
from tests.faults import Fault, train_with
from tests.settings import small

TIMES, CODE = 3, 93
LAUNCHED = 10  # every so many trials the real launcher restarts, in some 30 s


def r6(trial: Trial) -> float | None:
    """The same exception at the same step in every attempt."""
    begin = time.monotonic()
    if trial.seed % LAUNCHED == LAUNCHED - 1:
        words = ("model.factory=tests.nets:failing_net", "model.args.kind=exception")
        with launched(trial, words, nproc=2, max_restarts=9, launcher="dist-train") as tree:
            code = tree.wait(200.0)
            trial.fired = "an injected exception" in tree.output
            check(code == CODE, f"the launcher ended with {code}: {tree.tail()}")
            check(not tree.orphans(), "processes are left")
        attempts = status_of(tree.run_dir)["attempt"] + 1
        check(attempts == TIMES, f"{attempts} attempts")
        return time.monotonic() - begin
    rank, step = trial.dice.randrange(3), trial.dice.randrange(1, 20)
    place = trial.dice.choice(("in the forward", "in the backward", "in the data"))
    trial.notes |= {"rank": rank, "step": step, "place": place}
    config = small(trial.folder / "run", "train.steps=30", "optim.schedule=constant")
    for attempt in range(TIMES):
        mark = trial.folder / f"fired.{attempt}"
        fault = Fault(rank=rank, step=step, place=place, kind="exception", mark=str(mark))
        env = {"DIST_TRAIN_CHAIN": "c", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        ends = called(trial.folder, 3, train_with, config, fault, env=env)
        trial.fired = mark.exists()
        check(trial.fired, how_it_ended(ends, trial.folder))
        wanted = CODE if attempt == TIMES - 1 else 1
        status = status_of(trial.folder / "run")
        check(status["exit_code"] == wanted, f"attempt {attempt}: {status}")
    return time.monotonic() - begin


ROWS = (
    Row(
        id="R6",
        promise="the same exception at the same step three times ends the run with exit code 93",
        injection="an exception at one step in every attempt",
        num_trials=30,
        measures="the three attempts",
        work=r6,
    ),
)
