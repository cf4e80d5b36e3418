"""`dist-train verify-resume` tells a resume that is exact from one that is not, and why."""

import json
import random
from pathlib import Path

import pytest
import torch

from dist_train.differences import compare
from dist_train.plan import make_plan
from dist_train.rehearsal import note_randomness
from dist_train.verify_resume import _choose, main
from tests.faults import train_with
from tests.ranks import run_ranks
from tests.settings import SMALL, small

SHORT = ("data.args.num_train=140", "data.args.num_test=40")  # 5 steps an epoch


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["--nproc", "2", *SMALL, *SHORT, *words])
    out, errors = capsys.readouterr()
    return code, out, errors


@pytest.mark.exhaustive
def test_an_exact_resume_is_found_identical(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = verify(capsys, "--kills", "3", "model.factory=tests.nets:noisy_net")
    assert code == 0, out + errors
    assert "identical bit for bit after 3 of 3 kills and stops" in out
    assert "NOT REACHED" not in out
    assert "not tried" not in out, "an epoch is 5 steps"


@pytest.mark.exhaustive
def test_a_model_with_hidden_state_is_found_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, errors = verify(capsys, "--kills", "2", "model.factory=tests.nets:Counting")
    assert code == 1, out + errors
    assert "metrics.jsonl: step" in out
    assert "model.inner.0.weight: " in out
    assert "likely cause: two undisturbed trainings are identical, so the resume loses" in out


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", ["4", "5"])
def test_a_training_within_an_epoch_says_what_it_does_not_prove(
    steps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, errors = verify(capsys, "--kills", "1", "--steps", steps, "eval.every_epochs=null")
    assert code == 0, out + errors
    assert "not tried: the end of an epoch" in out
    assert "give --steps=11" in out


@pytest.mark.exhaustive
def test_a_best_save_that_a_resume_makes_is_disturbed_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The stop in the evaluation leaves it, and the save of the best, to the attempt that resumes;
    # killed in that save, it leaves both to the next one.
    words = ("--kills", "2", "--seed", "1", "--keep", "--work-dir", str(tmp_path))
    code, out, errors = verify(capsys, *words)
    assert code == 0, out + errors
    [log] = tmp_path.glob("verify-resume-*/disturbed.log")
    assert log.read_text().count("evaluation at step 5:") == 2


def test_the_first_save_that_is_disturbed_is_that_of_a_best(tmp_path: Path) -> None:
    plan = make_plan(
        small(tmp_path, "train.steps=20", "checkpoint.every_steps=2"), 126, world_size=2
    )
    faults = _choose(plan, 2, 6, 0, tmp_path)
    assert plan.steps_per_epoch == 5
    [in_the_save] = [fault for fault in faults if fault.place == "in the save"]
    assert in_the_save.step == 4, "the step after which the first evaluation comes"
    assert len({fault.place for fault in faults}) == 5


@pytest.mark.slow
def test_randomness_without_a_seed_is_found_out_in_any_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "B\u00fccher, it's a=(b[c{d\"e"
    folder.mkdir()
    words = ["--work-dir", str(folder), "--kills", "1", "model.factory=tests.nets:Drawing"]
    code, out, errors = verify(capsys, *words)
    assert code == 1, out + errors
    assert "not the resume, but randomness without a seed" in out
    assert "draws from the global generator of random" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kills", "0"], "--kills=0 must be 1 or more"),
        (["--steps", "4"], "--steps=4 is too short for 6 kills: give --steps=9"),
        (["--work-dir", "/nowhere"], "--work-dir=/nowhere is no folder"),
        (["optim.rl=1"], "optim.rl"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, errors = verify(capsys, *words)
    assert (code, out) == (2, "")
    assert told in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_the_first_other_state_line_and_result_are_named(tmp_path: Path) -> None:
    options = ("train.steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=9", "log_every=1")
    for name in ("one", "two"):
        run_ranks(train_with, 0, small(tmp_path / name, *options), None)
    assert compare(tmp_path / "one", tmp_path / "two") is None
    changed = tmp_path / "two" / "checkpoints" / "step_00000004" / "state.pt"
    state = torch.load(changed, weights_only=True)
    state["model"]["0.weight"][0, 0, 0, 0] += 1
    torch.save(state, changed)
    found = compare(tmp_path / "one", tmp_path / "two")
    assert found is not None
    assert (found.last_equal_state, found.first_other_state) == (2, 4)
    assert found.tensors == ["model.0.weight: 1 of 216 values differ, by 1 at most"]
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    third = json.loads(lines[2])
    lines[2] = json.dumps(third | {"train/loss": 7.0})
    (tmp_path / "two" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = compare(tmp_path / "one", tmp_path / "two")
    assert found is not None
    assert found.first_step == 3
    assert found.lines()[0] == f"metrics.jsonl: step 3: train/loss {third['train/loss']} and 7.0"


def test_a_draw_from_a_global_generator_is_noted(tmp_path: Path) -> None:
    assert run_ranks(_noted, 0, str(tmp_path / "a"), False) == [False]
    assert run_ranks(_noted, 0, str(tmp_path / "b"), True) == [True]


def _noted(path: str, draws: bool) -> bool:
    from dist_train import train as loop

    loop.train_step = lambda: random.random() if draws else None
    note_randomness(Path(path))
    loop.train_step()
    return Path(path).exists()
