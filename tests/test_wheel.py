"""The wheel is whole: installed elsewhere, it trains from an empty folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = (
    "device=cpu",
    "data=synthetic",
    "data.args.num_train=300",
    "data.args.num_test=40",
    "train.global_batch_size=32",
    "train.steps=3",
    "threads=1",
)
MINE = """\
# @package _global_
defaults:
  - override /model: tutorial_cnn
train:
  epochs: 1
optim:
  lr: 0.03125
"""

pytestmark = pytest.mark.slow


def shell(*words: str | Path, cwd: Path) -> str:
    """Run a command without this environment's own variables; returns its output."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shell(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
        *("--wheel-dir", folder, ROOT),
        cwd=folder,
    )
    return next(folder.glob("dist_train-*.whl"))


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone; returns the environment's folder of commands.

    The other packages come from this environment by a .pth file, whose own .pth files (that of
    this project's editable install) do not count there.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    shell(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        wheel,
        cwd=home,
    )
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (packages / "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_holds_configurations_and_scripts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, target in (("configs", "dist_train/_configs"), ("slurm", "dist_train/_slurm")):
        files = [path for path in (ROOT / source).rglob("*") if path.is_file()]
        assert files
        assert {f"{target}/{path.relative_to(ROOT / source)}" for path in files} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_the_installed_package_trains_from_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    where = shell(
        commands / "python", "-c", "import dist_train; print(dist_train.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(commands.parent)
    run = (commands / "dist-train", "run", "--nproc", "1", "run_dir=out")
    said = shell(*run, "experiment=cifar10_tutorial", *TINY, cwd=tmp_path)
    assert "test accuracy" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["state"], summary["steps"], summary["eval_samples"]) == ("finished", 3, 40)


def test_a_folder_of_the_users_own_groups(commands: Path, tmp_path: Path) -> None:
    mine = tmp_path / "groups" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(MINE)
    command = (commands / "dist-train", "run", "--nproc", "1", "--config-dir", "groups")
    words = (*command, "experiment=mine", "run_dir=out", *TINY)
    shown = shell(*words, "--print-config", cwd=tmp_path)
    assert "optim.lr: 0.03125" in shown
    shell(*words, cwd=tmp_path)
    assert "lr: 0.03125" in (tmp_path / "out" / "config.yaml").read_text()
