"""What the README tells a reader to type works as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.config.arguments import Parser, add_run_options, compose_request

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CODE = next(code for language, code in BLOCKS if language == "python" and "def stripes" in code)
MINE = next(code for _, code in BLOCKS if "data.name=mine:stripes" in code)
COMMANDS = [
    line
    for _, code in BLOCKS
    for line in code.replace("\\\n", " ").splitlines()
    if line.startswith(("dist-train run", "torchrun"))
]


def overrides_of(command: str) -> list[str]:
    """Return the words of a command that are dist_train's."""
    words = shlex.split(command)
    return [word for word in words if "=" in word and not word.startswith("-")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    parser = Parser()
    add_run_options(parser)
    options = parser.parse_intermixed_args(overrides_of(command))
    assert compose_request(options).config.experiment.startswith("cifar10_")


def test_the_readme_shows_the_two_commands() -> None:
    assert any(command.startswith("dist-train run") for command in COMMANDS)
    assert (
        "torchrun --standalone --nproc-per-node=8 -m dist_train experiment=cifar10_resnet9"
        in COMMANDS
    )


def test_your_own_model_and_data_are_under_twenty_lines() -> None:
    assert len(CODE.splitlines()) < 20


@pytest.mark.slow
def test_your_own_model_and_data_train(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE)
    tiny = ["data.args.num=400", "train.steps=2", "train.global_batch_size=32", "device=cpu"]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "dist_train", *overrides_of(MINE), *tiny],
        cwd=tmp_path,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"dataset +mine:stripes", done.stdout)
    assert re.search(r"test accuracy +[\d.]+% of 400", done.stdout)
