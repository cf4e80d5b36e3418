"""Modules of the user's own do what they like when imported: the run goes on, or says why not."""

import sys
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest

from dist_train.config import ConfigError
from dist_train.config.importing import import_callable
from dist_train.data import worker_loader
from dist_train.data.worker_loader import LONGEST_TMPDIR, find_place_for_sockets
from tests.mistakes import told
from tests.ranks import start_ranks_of
from tests.settings import SMALL

WANDERING = """
import os
import torch
from tests.nets import plain_net as net
os.makedirs("/tmp/elsewhere-of-a-test", exist_ok=True)
os.chdir("/tmp/elsewhere-of-a-test")

class Data:
    num_classes = 10
    def __init__(self, root, train):
        assert os.path.isfile(os.path.join(root, "here")), (root, os.getcwd())
    def __len__(self):
        return 48
    def __getitem__(self, index):
        return torch.full((3, 12, 12), index, dtype=torch.uint8), index % 10
"""


def _goes_on(folder: Path) -> list[tuple[int, str]]:
    (folder / "wandering.py").write_text(WANDERING)
    (folder / "set").mkdir()
    (folder / "set" / "here").touch()
    kept = [word for word in SMALL if not word.startswith(("data.", "model.factory"))]
    words = [*kept, "data.name=wandering:Data", "data.root=set", "model.factory=wandering:net"]
    words += ["data.num_workers=0", "data.val_fraction=0", "data.image_size=12"]
    steps = [["run_dir=run", "train.steps=2"], ["run_dir=run", "train.steps=3"]]
    steps += [["run_dir=next", "train.steps=4", "resume=run/checkpoints/step_00000003"]]
    return [told(folder, [*words, *more]) for more in steps]


@pytest.mark.slow
def test_relative_folders_are_those_of_the_command(tmp_path: Path) -> None:
    [outcome] = start_ranks_of(_goes_on, 0, tmp_path)
    assert outcome.trace == ""
    assert outcome.value == [(0, "")] * 3
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()
    assert "at step 3" in (tmp_path / "next" / "log" / "rank0.txt").read_text()
    assert (tmp_path / "next" / "summary.json").is_file()
    assert list(Path("/tmp/elsewhere-of-a-test").iterdir()) == []


def test_a_module_may_parse_arguments_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import argparse\nparser = argparse.ArgumentParser()\n"
        "parser.add_argument('--depth', type=int, default=3)\noptions = parser.parse_args()\n"
        "def net(): return options.depth\n"
    )
    (tmp_path / "parsing_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["dist_train", "optim.lr=0.1", "--dry-run"]
    monkeypatch.setattr(sys, "argv", words)
    assert import_callable("parsing_module:net", "model.factory")() == 3
    assert sys.argv is words


def test_workers_meet_where_the_name_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(util, "get_temp_dir", lambda: made.append(tempfile.gettempdir()))
    short = tmp_path / "s"
    short.mkdir()
    monkeypatch.setattr(worker_loader, "SHORT_TMPDIRS", ("/nowhere", str(short)))
    monkeypatch.setattr(tempfile, "tempdir", "/t" * (LONGEST_TMPDIR // 2))
    find_place_for_sockets()
    assert made == [], "as short as it must be"
    monkeypatch.setattr(tempfile, "tempdir", "/t" * LONGEST_TMPDIR)
    find_place_for_sockets()
    assert made == [str(short)]
    assert tempfile.tempdir == "/t" * LONGEST_TMPDIR
    monkeypatch.setattr(worker_loader, "SHORT_TMPDIRS", ("/nowhere",))
    with pytest.raises(ConfigError, match="is too long for the sockets of loader workers"):
        find_place_for_sockets()
