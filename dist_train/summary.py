"""What a finished run says of itself: summary.json, and the table at its end."""

import math
from typing import Any

import torch

from dist_train.checkpoint import weights_sha256
from dist_train.data.loaders import Data
from dist_train.progress import Progress
from dist_train.state import Parts


def make_summary(
    parts: Parts, progress: Progress, data: Data, result: dict[str, float], device: str
) -> dict[str, Any]:
    """Return the summary of a finished run; `result` is the evaluation of its test split."""
    sec, ranks = progress.train_sec, parts.replica.ranks
    return {
        "state": "finished",
        "dataset": data.name,
        "image_size": data.image_size,
        "loading": data.loading,
        "augmentation": data.augmentation,
        "world_size": ranks.world_size,
        "device": device,
        "precision": parts.precision,
        "precision_asked": parts.config.precision,
        "memory_format": parts.memory_format,
        "sync": parts.replica.form,
        "steps": progress.step,
        "epochs": round(parts.plan.epoch(progress.step), 4),
        "global_batch_size": parts.plan.global_batch_size,
        "samples_seen": progress.samples_seen,
        "skipped_steps": progress.skipped_steps,
        "train_sec": sec,
        "train_images_per_sec": progress.samples_seen / sec if sec > 0 else math.nan,
        "eval_split": "test",
        "eval_accuracy": result["accuracy"],
        "eval_top5": result["top5"],
        "eval_loss": result["loss"],
        "eval_samples": int(result["samples"]),
        "eval_views_accuracy": result.get("views_accuracy"),
        "best_val_accuracy": progress.best_accuracy,
        "best_step": progress.best_step,
        "early_stopped": progress.patience_is_over,
        "wall_sec": progress.wall_sec,
        "attempt": ranks.attempt,
        "weights_sha256": weights_sha256(parts.replica.module.state_dict()),
        "torch": str(torch.__version__),
    }


def _views(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the line of an evaluation over several views, if there was one."""
    accuracy = summary.get("eval_views_accuracy")
    return [] if accuracy is None else [("over views", f"{accuracy:.2%}")]


def table(summary: dict[str, Any]) -> str:
    """Return the table that a run ends with."""
    rate, best = summary["train_images_per_sec"], summary["best_val_accuracy"]
    rows = [
        ("dataset", summary["dataset"]),
        ("test accuracy", f"{summary['eval_accuracy']:.2%} of {summary['eval_samples']:,}"),
        *_views(summary),
        ("best validation", "no split" if best is None else f"{best:.2%}"),
        (
            "trained",
            f"{_counted(summary['epochs'], 'epoch')}, {_counted(summary['steps'], 'step')}",
        ),
        ("images/s", f"{rate:,.0f} on {summary['world_size']} x {summary['device']}"),
        ("precision", summary["precision"]),
        ("time", f"{summary['wall_sec']:,.0f} s"),
        ("files", summary["run_dir"]),
    ]
    return "\n".join(f"  {name:<16} {value}" for name, value in rows)


def _counted(number: float, word: str) -> str:
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {word}{'' if number == 1 else 's'}"
