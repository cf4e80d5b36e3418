"""The fault campaign counts honestly, and the README shows what its results say."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import results
from benchmarks.reliability.campaign import run_rows, run_trial
from benchmarks.reliability.clean import CleanRuns
from benchmarks.reliability.registry import ROWS, rows_named
from benchmarks.reliability.row import Options, Row, Trial, Work, check
from benchmarks.reliability.table import README, cells, make_table, table_in

IDS = [
    "R1",
    "R2",
    "R3",
    "R4",
    "R5",
    "R6",
    "R7",
    "R8",
    "P1",
    "P2",
    "P3",
    "P4",
    "J1",
    "H1",
    "H2",
    "H3",
    "S1",
    "N1",
    "N2",
    "D1",
    "D2",
    "D3",
    "D4",
    "D5",
    "D6",
    "O1",
    "O2",
    "C1",
    "C2",
    "C3",
    "C4",
    "C5",
    "C6",
    "C7",
    "C8",
    "C9",
    "C10",
    "W1",
    "W2",
    "X1",
    "X2",
    "X3",
    "X4",
    "X5",
    "X6",
    "U1",
    "L1",
]


def row(work: Work | None, **options: Any) -> Row:
    settings = {"num_trials": 3, "promise": "what holds", "injection": "a fault"} | options
    return Row(id="T1", work=work, **settings)


def trial(tmp_path: Path, seed: int = 0) -> Trial:
    return Trial(seed=seed, folder=tmp_path, clean=CleanRuns(tmp_path / "clean"))


def record(seed: int, passed: bool, code: str = "a", **more: Any) -> dict[str, Any]:
    base = {"seed": seed, "passed": passed, "sec": 1.0 + seed, "fired": True, "reason": "why"}
    return base | {"faults": 1, "notes": {}, "commit": code, "code": code} | more


def fires(trial: Trial) -> float | None:
    trial.fired = True
    return 0.5


def run(folder: Path, work: Work, **options: Any) -> bool:
    asked: dict[str, Any] = {"num_trials": None, "seeds": None, "small": False, "again": False}
    asked |= {"options": Options(), "folder": folder, "keep": None} | options
    return run_rows([row(work)], **asked)


def test_the_table_of_the_readme_is_what_the_committed_results_say() -> None:
    assert table_in(README.read_text()) == make_table().strip(), (
        "run `python -m benchmarks.reliability table --write`"
    )


def test_every_row_of_the_list_is_there_once_built_or_not() -> None:
    assert sorted(row.id for row in ROWS) == sorted(IDS)
    for one in ROWS:
        assert one.promise
        assert one.injection
        assert one.work is None or one.measures
    shown = make_table()
    assert all(f"| {name} |" in shown for name in IDS)


def test_the_bound_is_that_of_clopper_and_pearson() -> None:
    for passed, total, bound in ((100, 100, 0.97049), (20, 20, 0.86089), (1, 1, 0.05)):
        assert results.lower_bound(passed, total) == pytest.approx(bound, abs=1e-5)
    # scipy.stats.beta.ppf(0.05, 9, 2) and (0.05, 95, 6)
    assert results.lower_bound(9, 10) == pytest.approx(0.60584, abs=1e-5)
    assert results.lower_bound(95, 100) == pytest.approx(0.89775, abs=1e-5)
    assert results.lower_bound(0, 10) == 0.0


def test_a_trial_whose_fault_never_fired_fails(tmp_path: Path) -> None:
    ended = run_trial(row(lambda trial: 1.0), trial(tmp_path))
    assert (ended["passed"], ended["reason"]) == (False, "the fault never fired")


@pytest.mark.filterwarnings("ignore")
def test_a_broken_promise_an_error_and_a_hang_fail_with_their_reason(tmp_path: Path) -> None:
    def broken(trial: Trial) -> float | None:
        fires(trial)
        check(1 + 1 == 3, "one and one is not three")
        return None

    def error(trial: Trial) -> float | None:
        fires(trial)
        raise OSError("no disk")

    def hang(trial: Trial) -> float | None:
        fires(trial)
        time.sleep(60)
        return None

    wanted = {broken: "one and one is not three", error: "OSError: no disk", hang: "not over"}
    for work, reason in wanted.items():
        ended = run_trial(row(work, limit_sec=0.2), trial(tmp_path))
        assert not ended["passed"]
        assert reason in ended["reason"]


def test_results_are_appended_and_seeds_done_with_this_code_are_not_repeated(
    tmp_path: Path,
) -> None:
    assert run(tmp_path, fires, num_trials=2)
    assert run(tmp_path, fires)
    assert [line["seed"] for line in results.read(tmp_path, "T1")] == [0, 1, 2]
    assert run(tmp_path, fires, again=True, seeds=[1])
    lines = results.read(tmp_path, "T1")
    assert [line["seed"] for line in lines] == [0, 1, 2, 1]
    for name in (
        "id",
        "seed",
        "passed",
        "sec",
        "fired",
        "reason",
        "commit",
        "torch",
        "cpu",
        "date",
    ):
        assert name in lines[0]
    older = [json.dumps(line | {"code": "older"}) for line in lines]
    (tmp_path / "T1.jsonl").write_text("\n".join(older) + "\n")
    assert run(tmp_path, fires)
    assert len(results.read(tmp_path, "T1")) == 7, "other code: all three again"


def test_a_failed_trial_makes_the_campaign_fail(tmp_path: Path) -> None:
    assert not run(tmp_path, lambda trial: 1.0, num_trials=1)


def test_a_failure_stays_until_newer_code_passes_the_same_seed() -> None:
    flaky = [record(0, True), record(1, False), record(1, True)]
    now = results.standing(flaky)
    assert (now.num_passed, now.num_seeds) == (1, 2)
    assert now.reasons == ["seed 1: why"]
    mended = results.standing([*flaky, record(1, True, "b")])
    assert (mended.num_passed, mended.num_seeds) == (2, 2)
    assert mended.commits == ["a", "b"]


def test_the_table_says_what_is_missing_and_what_fails() -> None:
    built = row(fires, num_trials=3)
    assert cells(row(None), results.standing([]))[-1] == "NOT BUILT"
    assert cells(built, results.standing([]))[-1] == "NOT RUN yet"
    assert cells(row(fires, needs="a GPU"), results.standing([]))[-1] == "NOT RUN: needs a GPU"
    some = cells(built, results.standing([record(0, True)]))
    assert some[-1] == "passes so far, 1 of 3 trials done"
    bad = cells(built, results.standing([record(0, True), record(1, False)]))
    assert bad[-1] == "**FAILS** 1 of 2"
    whole = cells(built, results.standing([record(seed, True) for seed in range(3)]))
    assert (whole[2], whole[3], whole[-1]) == ("3/3", "36.8%", "passes")
    many = results.standing([record(0, True, faults=50), record(1, False, faults=50)])
    assert cells(built, many)[2] == "50/100", "a failed trial loses all its faults"


def test_a_row_that_this_machine_cannot_run_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(fires, cannot_run=lambda: "no such device")]
    asked: dict[str, Any] = {"num_trials": 1, "seeds": None, "small": False, "again": False}
    assert run_rows(rows, **asked, options=Options(), folder=tmp_path, keep=None)
    assert "T1   NOT RUN: no such device" in capsys.readouterr().out


def test_an_unknown_row_is_told_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"no row Q9: choose from R1, R2"):
        rows_named(["R1", "Q9"])
