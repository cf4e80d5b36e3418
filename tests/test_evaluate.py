"""Every sample is evaluated exactly once, with the same numbers at any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config
from dist_train.recovery import Recovery
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small


def evaluated(config: Config) -> dict[str, Any]:
    """Train on one process's worth of nothing, then evaluate: the initial weights."""
    from dist_train import train as loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recovery, "decide", lambda self, norm, failure, step: "skip")
        return loop.train(config)


@pytest.mark.slow
def test_evaluation_is_identical_on_1_2_3_and_4_ranks(tmp_path: Path) -> None:
    # 70 test pictures in batches of 16: the last is smaller, and no count of ranks divides five
    options = ("train.steps=1", "optim.ema_decay=0.5")
    found = [run_ranks(evaluated, n, small(tmp_path / str(n), *options))[0] for n in (1, 2, 3, 4)]
    for summary in found:
        assert summary["eval_samples"] == 70
        for key in ("eval_accuracy", "eval_top5", "eval_loss"):
            assert summary[key] == found[0][key], key


@pytest.mark.slow
def test_the_summary_counts_the_whole_test_split_and_the_log_the_validation_split(
    tmp_path: Path,
) -> None:
    run_ranks(evaluated, 2, small(tmp_path, "train.steps=1"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval_samples"] == 70
    [line] = [m for m in metrics(tmp_path) if "eval/samples" in m]
    assert (line["eval/samples"], line["eval/split"]) == (24, "val")


def trained(config: Config) -> dict[str, Any]:
    from dist_train.train import train

    return train(config)


def test_without_a_validation_split_the_test_split_is_evaluated_and_nothing_is_best(
    tmp_path: Path,
) -> None:
    summary = run_ranks(trained, 0, small(tmp_path, "data.val_fraction=0", "train.epochs=2"))[0]
    lines = [m for m in metrics(tmp_path) if "eval/samples" in m]
    assert [m["eval/split"] for m in lines] == ["test", "test"]
    assert summary["eval_accuracy"] == lines[-1]["eval/accuracy"]
    assert summary["best_step"] is None


def test_early_stopping_ends_the_run_and_takes_the_best_weights(tmp_path: Path) -> None:
    options = ("train.epochs=30", "train.early_stop_patience=2", "optim.lr=3", "optim.clip_norm=1")
    summary = run_ranks(trained, 2, small(tmp_path, *options))[0]
    lines = [m for m in metrics(tmp_path) if "eval/accuracy" in m]
    accuracies = [m["eval/accuracy"] for m in lines]
    assert summary["early_stopped"]
    assert summary["steps"] < 30 * 9
    assert max(accuracies) == summary["best_val_accuracy"]
    assert len(accuracies) == accuracies.index(max(accuracies)) + 1 + 2
    assert (tmp_path / "checkpoints" / f"step_{summary['best_step']:08d}").is_dir()
    again = run_ranks(trained, 2, small(tmp_path, *options))[0]
    assert again == summary, "the same command trains on after an early stop"


def test_early_stopping_finds_a_best_that_is_still_being_written(tmp_path: Path) -> None:
    options = ("train.epochs=1", "train.early_stop_patience=5")
    summary = run_ranks(trained, 2, small(tmp_path, *options))[0]
    assert summary["best_step"] == summary["steps"] == 9


def failing(config: Config) -> dict[str, Any]:
    """Train; rank 1 fails on its second batch of an evaluation."""
    import os

    from dist_train import train as loop
    from dist_train.tasks import classification

    real, calls = classification.eval_sums, []

    def eval_sums(*args: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            raise ValueError("a picture that cannot be")
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "eval_sums", eval_sums)
        return loop.train(config)


@pytest.mark.parametrize("sync", ["flat", "ddp"])
def test_an_exception_on_one_rank_in_an_evaluation_is_the_same_failure_on_all(
    sync: str, tmp_path: Path
) -> None:
    config = small(tmp_path, "train.steps=1", "data.val_fraction=0", f"parallel.sync={sync}")
    outcomes = start_ranks_of(failing, 2, config)
    [text] = {str(o.error) for o in outcomes}
    assert "rank 1 failed in the evaluation of the test split: ValueError: a picture" in text
