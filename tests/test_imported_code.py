"""Code that has changed since a run was saved or finished is told of, file by file."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train import imported_code
from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import read_verified
from dist_train.config import Config
from dist_train.config.compose import compose
from dist_train.config.whole_file import read_json
from dist_train.imported_code import changes_of_code, code_on_disk
from dist_train.imported_code import imported_code as code_of
from dist_train.train import train
from tests.settings import small

NET = "from codes.layers import layers\n\ndef net(num_classes):\n    return layers(num_classes)\n"
LAYERS = "from tests.nets import plain_net as layers\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's package `codes` of which two files are imported, with a third beside them."""
    folder = tmp_path / "project" / "codes"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "network.py").write_text(NET)
    (folder / "layers.py").write_text(LAYERS)
    (folder / "unused.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "codes"]:
        del sys.modules[name]


def config_of(run_dir: Path, *overrides: str) -> Config:
    return small(run_dir, "model.factory=codes.network:net", *overrides)


def run(run_dir: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    train(config_of(run_dir, *overrides))
    return capsys.readouterr().out


def test_a_resume_says_which_files_changed_and_since_when(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "changed" not in run(tmp_path / "run", capsys, "train.steps=2")
    assert "changed" not in run(tmp_path / "run", capsys, "train.steps=3").replace(
        "length changes", ""
    )
    (project / "layers.py").write_text(LAYERS + "# another thought\n")
    (project / "unused.py").write_text("# nobody imports it\n")
    told = run(tmp_path / "run", capsys, "train.steps=4")
    assert "since step 3 was saved codes/layers.py has changed: the run goes on" in told
    assert "unused" not in told
    assert "network.py" not in told
    assert "dist_train itself" not in told


def test_a_finished_run_says_so_above_its_table_and_how_to_start_anew(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    before = run(run_dir, capsys, "train.steps=2")
    assert "since this run was finished" not in run(run_dir, capsys, "train.steps=2")
    (project / "network.py").write_text(NET + "\nLIMIT = 3\n")
    told = run(run_dir, capsys, "train.steps=2")
    warning = told.index("since this run was finished codes/network.py has changed")
    assert warning < told.index("test accuracy")
    assert f"to train anew add run_dir={run_dir}-2 to the command" in told
    assert before.splitlines()[-1] == told.splitlines()[-1]
    assert read_json(run_dir / "status.json")["state"] == "finished"


def test_the_checkpoint_and_the_environment_hold_the_digests(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", capsys, "train.steps=2")
    state = load_state(read_verified(tmp_path / "run" / "checkpoints" / "step_00000002"))
    code = state["facts"]["code"]
    assert set(code["files"]) == {"codes/__init__.py", "codes/network.py", "codes/layers.py"}
    assert code == read_json(tmp_path / "run" / "environment.json")["code"]


def test_a_changed_toolkit_is_one_line(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    run(tmp_path / "run", capsys, "train.steps=2")
    edited = tmp_path / "edited"
    shutil.copytree(imported_code.TOOLKIT, edited, ignore=shutil.ignore_patterns("__pycache__"))
    (edited / "step.py").write_text("")
    (edited / "start.py").write_text("")
    monkeypatch.setattr(imported_code, "TOOLKIT", edited)
    told = run(tmp_path / "run", capsys, "train.steps=3")
    assert told.count("dist_train itself has changed") == 1
    assert "step.py" not in told


def test_installed_packages_are_left_out(tmp_path: Path) -> None:
    importlib.import_module("torchvision.models")
    config = compose(["model.factory=torchvision.models:resnet18"]).config
    assert code_of(config)["files"] == {}


def test_what_was_moved_or_added_is_told() -> None:
    now = {"toolkit": "t", "files": {"a.py": "1", "b.py": "2"}}
    before = {"toolkit": "t", "files": {"a.py": "1", "c.py": "3"}}
    assert changes_of_code(before, now) == ["b.py is new", "c.py is gone"]
    assert changes_of_code({}, now) == [], "a run of an earlier version: nothing is known"


def test_nothing_is_imported_to_look_at_a_finished_run(project: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    before = {"toolkit": "t", "files": {"codes/layers.py": "0", "codes/lost.py": "1"}}
    now = code_on_disk(config, before)
    assert set(now["files"]) == {"codes/layers.py"}
    assert "codes.network" not in sys.modules
