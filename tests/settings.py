"""Configurations for the tests: seconds, not minutes."""

from pathlib import Path
from typing import Any

from dist_train.config import Config
from dist_train.config.compose import compose

SMALL = (
    "experiment=cifar10_tutorial",
    "data.name=synthetic",
    "data.args.num_train=240",
    "data.args.num_test=70",
    "data.args.image_size=12",
    "data.crop_padding=1",
    "data.eval_batch_size=16",
    "model.factory=tests.nets:plain_net",
    "train.global_batch_size=24",
    "optim.warmup_epochs=0",
    "log_every=5",
    "threads=1",
    "precision=fp32",
    "device=cpu",
    "checkpoint.exact_steps=true",
    "parallel.start_timeout_sec=60",
    "parallel.step_timeout_sec=30",
)


def small(run_dir: Path | str, *overrides: str) -> Config:
    """Return a tiny training on 216 synthetic pictures: 9 steps an epoch."""
    return compose([*SMALL, f"run_dir={run_dir}", *overrides]).config


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl."""
    import json

    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
