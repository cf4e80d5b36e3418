"""`dist-train checkpoint ls|verify|show`: what it prints and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.checkpoint import write_checkpoint
from dist_train.checkpoint_tool import main
from tests.faults import train_with
from tests.ranks import run_ranks
from tests.settings import small
from tests.spoilt_checkpoints import crafted_states, seal_state
from tests.storage_faults import STATE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (9, 10):
        write_checkpoint(folder, STATE, step=step)
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("verb", ["ls", "verify"])
@pytest.mark.parametrize("what", ["", "checkpoints", "checkpoints/step_00000010"])
def test_good_ones_are_a_table_and_exit_0(
    verb: str, what: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(run / what)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["checkpoint", "step", "MiB", "saved", "state"]
    assert lines[1].startswith("step_00000010  10 ")
    assert lines[1].endswith("good")
    assert len(lines) == (3 if what.endswith("10") else 4)


def test_a_flipped_bit_is_bad_and_exit_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "checkpoints" / "step_00000010" / "state.pt")
    assert main(["ls", str(run)]) == 0, "it reads the manifests only, and says so"
    assert "verify` reads every byte" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 1
    table = capsys.readouterr().out.splitlines()
    assert "BAD:" in table[1]
    assert "was changed" in table[1]
    assert table[2].endswith("good")
    assert table[-1] == "2 verified, 1 bad"
    assert main(["show", str(run / "checkpoints" / "step_00000010")]) == 1
    assert "was changed" in capsys.readouterr().err
    assert main(["show", str(run)]) == 0, "the newest good one"
    shown = capsys.readouterr().out
    assert "checkpoint refused" in shown
    assert "step 9, saved" in shown


def test_a_cut_file_is_bad_in_a_list_too(run: Path) -> None:
    (run / "checkpoints" / "step_00000009" / "state.pt").write_bytes(b"")
    assert main(["ls", str(run)]) == 1
    assert main(["verify", str(run)]) == 1


def test_what_would_run_code_is_bad_although_its_checksums_are_right(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "step_00000010"
    seal_state(path, crafted_states(tmp_path / "owned")["a zip with os.system"])
    assert main(["verify", str(path)]) == 1
    assert main(["show", str(path)]) == 1
    assert "posix.system" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ls"], "the following arguments are required: path"),
        (["list", "x"], "invalid choice: 'list'"),
        (["ls", "/nowhere"], "/nowhere is no folder"),
        (["verify", "/usr"], "/usr holds no checkpoints"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_it_shows_what_a_real_run_saved(tmp_path: Path) -> None:
    run_ranks(train_with, 0, small(tmp_path, "train.steps=9"), None)
    command = [sys.executable, "-m", "launch.cli", "checkpoint", "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step 9, saved 20" in done.stdout
    for line in ("  progress.step", "  facts.torch", "  facts.data.num_train", "settings ("):
        assert line in done.stdout
    [weight] = [line for line in done.stdout.splitlines() if line.startswith("  model.0.weight")]
    assert weight.split()[1] == "float32"
    assert "  global_batch_size: 24" in done.stdout
