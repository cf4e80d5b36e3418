"""Each mistake of a user is answered by one line that names the cure, and by exit code 2."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.config.arguments import LINGER_SEC, refuse
from tests.mistakes import MISTAKES, NO_GPU, only_line, told, trained
from tests.ranks import free_port, start_ranks_of
from tests.settings import SMALL

REPOSITORY = Path(__file__).parents[1]
LAUNCHER = """
import sys
from launch.cli import main
code = main()
assert not {"torch", "numpy"} & sys.modules.keys(), "the launcher waits for no heavy import"
sys.exit(code)
"""
BEFORE_THE_START = {
    "misspelt key": (["optm.lr=0.1"], "unknown key 'optm.lr': did you mean optim.lr?"),
    "another tool's name": (["learning_rate=0.1"], "did you mean optim.lr?"),
    "another tool's batch": (["batch_size=64"], "did you mean train.global_batch_size?"),
    "switch instead of a mode": (["tracking.wandb=true"], "did you mean tracking.wandb.mode=auto?"),
    "group instead of a setting": (["train=3"], "it is a group of settings: train.epochs"),
    "choice without its group": (["quickstart"], "write experiment=quickstart"),
    "setting as an option": (["--lr", "0.1"], "settings are written optim.lr=0.1"),
    "another launcher's option": (["--nproc-per-node=2"], "did you mean --nproc?"),
    "variable that is not set": (
        ["run_dir="],
        "run_dir is empty, as of a variable",
    ),
    "home of nobody": (["data.root=~nobody-here/x"], "there is no home of ~nobody-here"),
    "argument that is not there": (
        ["~model.args.depth"],
        "takes 'depth' out of model.args, ",
    ),
    "misspelt group": (["modle=resnet9"], "unknown key 'modle': did you mean model?"),
    "misspelt choice of a group": (["model=resnet99"], "does not exist: did you mean resnet9?"),
    "no such choice of a group": (["optim=lion"], "optim=lion does not exist: choose one of"),
    "no choice of a group": (["optim={lr: 3}"], "optim={lr: 3} does not exist: choose one of"),
    "misspelt choice of a key": (
        ["optim.name=sdg"],
        "optim.name=sdg is not a choice: choose one of sgd, adamw",
    ),
    "wrong type": (["train.epochs=two"], "train.epochs=two has the wrong type"),
    "out of range": (["optim.lr=-1"], "optim.lr=-1.0 is out of range: it must be above 0"),
    "no value": (["optim.lr"], "write key=value, like optim.lr=0.1"),
    "deleted setting": (["~optim.lr"], "cannot be: write optim.lr=VALUE"),
    "several values": (["optim.lr=1,2"], "one run takes one value"),
    "value of the environment": (["data.root=${oc.env:HOME}"], "data.root=$VALUE"),
    "unknown option": (["--nporc=2"], "unrecognized arguments: --nporc=2"),
    "number of ranks": (["--nproc=none"], "--nproc=none must be auto or a number"),
    "batch smaller than the ranks": (
        ["--nproc=8", "train.global_batch_size=6"],
        "raise train.global_batch_size to 8 or more, or start at most 6 ranks",
    ),
    "unlike numbers of micro-batches": (
        [
            "--nproc=3",
            "train.global_batch_size=1000",
            "train.micro_batch_size=333",
            "parallel.sync_batchnorm=true",
        ],
        "set train.micro_batch_size=334, or a train.global_batch_size that the ranks divide",
    ),
    "text without quotes": (["data.root=/data/a=b"], """'data.root="/data/a=b"'"""),
    "precision": (["device=cpu", "precision=fp16"], "use precision=bf16 or fp32"),
    "no such file": (["--config=/nowhere.yaml"], "--config /nowhere.yaml: "),
    "no such folder": (["--config-dir=/nowhere"], "--config-dir /nowhere is not a folder"),
    "port out of range": (["--master-port=70000"], "give one from 1 to 65535"),
}

# Mistakes that come to light at different places, each by another part of the code.
OF_EACH_PLACE = (
    "missing data root",
    "truncated picture",
    "CIFAR-10 that is not there",
    "resume from a checkpoint of another model",
    "module that is a program",
    "wrong number of classes",
    "factory that raises",
    "model that raises in its first backward",
    "item that raises in a worker",
    "data set that no worker can be sent",
    "label of the test split that training lacks",
    "no GPU",
)


def run(
    *command: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | NO_GPU | (env or {})
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def dist_train_run(
    folder: Path,
    *words: str,
    prefix: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    lines: int = 1,
) -> str:
    """Return the only line (or `lines`) that the real command writes on standard error."""
    command = [sys.executable, "-m", "launch.cli", "run", "--nproc", "1", *words]
    done = run(*prefix, *command, cwd=folder, env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    return only_line(done.stderr, lines=lines)


def torchrun(folder: Path, *words: str) -> str:
    """Return the line that a run under torchrun writes exactly once."""
    command = ["--standalone", "--nproc-per-node=2", "-m", "dist_train", *words]
    done = run(sys.executable, "-m", "torch.distributed.run", *command, cwd=folder)
    assert done.returncode == 1, "torchrun folds every code into 1"
    assert done.stderr.count("Traceback (most recent call last)") == 1, "torchrun's own report"
    lines = [line for line in done.stderr.splitlines() if "dist-train: error: " in line]
    assert len(lines) == 1, done.stderr
    return only_line(lines[0] + "\n")


def line_after_torchs_own(text: str) -> str:
    """Return the one line of an error before which torch's store warned in its own words."""
    lines = text.splitlines(keepends=True)
    assert all("[c10d]" in line for line in lines[:-1]), text
    return only_line(lines[-1])


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", BEFORE_THE_START)
def test_the_launcher_answers_without_torch_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    words, cure = BEFORE_THE_START[name]
    done = run(sys.executable, "-c", LAUNCHER, "run", "--nproc=2", *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert cure in only_line(done.stderr)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_answers_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("dist-train")
    done = run(str(script), "run", "optm.lr=0.1", cwd=tmp_path)
    assert done.returncode == 2
    assert only_line(done.stderr) == BEFORE_THE_START["misspelt key"][1]


def test_a_taken_port_is_told_before_torchrun_starts(taken_port: int, tmp_path: Path) -> None:
    words = ["run", "--nproc=2", f"--master-port={taken_port}", *SMALL]
    done = run(sys.executable, "-c", LAUNCHER, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    line = only_line(done.stderr)
    assert f"port {taken_port} cannot be used here (Address already in use)" in line
    assert "choose another --master-port" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_the_ranks_say_it_once(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    words = mistake.prepare(tmp_path)
    outcomes = start_ranks_of(told, 2, tmp_path, words, env=NO_GPU | mistake.env)
    assert [o.trace for o in outcomes] == ["", ""]
    assert [o.value[0] for o in outcomes] == [2, 2]
    line = only_line(outcomes[0].value[1], lines=mistake.lines)
    for part in mistake.told:
        assert part in line
    assert outcomes[1].value[1] == "", "only the first rank of a node speaks"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_PLACE)
def test_dist_train_run_says_it_once_and_nothing_else(name: str, tmp_path: Path) -> None:
    # All of them by the real command: `make reliability ROWS=U1`.
    mistake = MISTAKES[name]
    words = mistake.prepare(tmp_path)
    line = dist_train_run(tmp_path, *words, env=mistake.env, lines=mistake.lines)
    for part in mistake.told:
        assert part in line


@pytest.mark.slow
def test_torchrun_shows_a_mistake_before_the_start_once(tmp_path: Path) -> None:
    assert torchrun(tmp_path, "optm.lr=0.1") == BEFORE_THE_START["misspelt key"][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torchrun_shows_a_mistake_after_the_start_once(tmp_path: Path) -> None:
    mistake = MISTAKES["wrong number of classes"]
    line = torchrun(tmp_path, *mistake.prepare(tmp_path))
    assert all(part in line for part in mistake.told)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"])
def test_a_silent_rank_does_not_end_before_the_one_that_speaks(
    variable: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv(variable, "1")
    assert refuse("what", 2, speak=True) == 2
    assert waited == []
    assert capfd.readouterr().err == "dist-train: error: what\n"
    assert refuse("what", 2, speak=False) == 2
    assert sum(waited) == pytest.approx(LINGER_SEC)
    before = len(waited)
    assert refuse("what", 2, speak=False, asked_to_end=lambda: True) == 2
    assert len(waited) == before, "the launcher is ending this rank: the speaker has spoken"
    assert capfd.readouterr().err == ""


def test_ranks_of_another_number_than_the_launcher_checked(tmp_path: Path) -> None:
    words = [*SMALL, "train.global_batch_size=1"]
    outcomes = start_ranks_of(told, 2, tmp_path, words)
    assert [o.value[0] for o in outcomes] == [2, 2]
    assert "raise train.global_batch_size to 2 or more" in only_line(outcomes[0].value[1])
    assert outcomes[1].value[1] == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_resume_on_more_ranks_than_the_last_step_has_samples(tmp_path: Path) -> None:
    words = ["train.global_batch_size=107", "train.drop_last=false"]  # 216 = 2 x 107 + 2
    run_dir = trained(tmp_path, *words)
    words += [f"run_dir={run_dir}", "train.steps=3"]
    outcomes = start_ranks_of(told, 3, tmp_path, [*SMALL, *words])
    assert [o.value[0] for o in outcomes] == [2, 2, 2]
    line = only_line(outcomes[0].value[1])
    assert line.startswith("the last step of an epoch has 2 samples (216 of training, ")
    assert line.endswith("or start at most 2 ranks")


def _own_settings(folder: Path) -> tuple[int, str]:
    return told(folder, [*SMALL, f"seed={os.environ['RANK']}"])


def _own_world_size(folder: Path) -> tuple[int, str]:
    if os.environ["RANK"] == "1":
        os.environ["WORLD_SIZE"] = "3"
    return told(folder, [*SMALL])


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (_own_settings, ("rank 1 on", "has other settings", "the same command")),
        (_own_world_size, ("was told world_size=3, rank 0 2", "--nnodes and --nproc-per-node")),
    ],
)
def test_ranks_that_disagree_all_end(work: object, said: tuple[str, ...], tmp_path: Path) -> None:
    outcomes = start_ranks_of(work, 2, tmp_path)  # pyright: ignore[reportArgumentType]
    assert [o.value[0] for o in outcomes] == [2, 2]
    line = only_line(outcomes[0].value[1])
    assert all(part in line for part in said), line
    assert outcomes[1].value[1] == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [*SMALL, "parallel.start_timeout_sec=1"]
    [outcome] = start_ranks_of(told, 0, tmp_path, words, env=place | address)
    assert outcome.value[0] == 2, outcome.trace
    line = line_after_torchs_own(outcome.value[1])
    assert "rank 1, 2 of 3 did not come" in line
    assert "--nproc-per-node" in line


def test_a_slurm_step_says_that_its_port_is_taken(taken_port: int, tmp_path: Path) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken_port)}
    [outcome] = start_ranks_of(told, 0, tmp_path, [*SMALL], env=step | address)
    assert outcome.value[0] == 2, outcome.trace
    line = line_after_torchs_own(outcome.value[1])
    assert f"port {taken_port} is taken on 127.0.0.1: choose another" in line


DISKS = {
    "read-only": ("size=64m,ro", "", ("Read-only file system", "choose another run_dir")),
    "full": (
        "size=64k",
        "cat /dev/zero > run/fill 2> /dev/null;",
        ("No space left", "free some space"),
    ),
    "nearly full": ("size=64k", "", ("No space left", "free some space")),
    "too small for checkpoints": ("size=2m", "", ("its checkpoints need", "free some space")),
}


def in_a_small_disk(name: str) -> tuple[str, ...]:
    """Return what goes before a command to have ./run on such a disk, for that command alone."""
    options, before, _ = DISKS[name]
    mount = f'mount -t tmpfs -o {options} tmpfs run || exit 99; {before} exec "$@"'
    become_root = ["-r"] if os.geteuid() != 0 else []
    return ("unshare", *become_root, "-m", "sh", "-c", mount, "sh")


DISK_WORDS = [*SMALL, "run_dir=run", "train.steps=2", "model.args.width=80"]


@pytest.mark.slow
def test_a_full_disk_is_told_by_one_process_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    command = [*in_a_small_disk("full"), sys.executable, "-m", "dist_train", *DISK_WORDS]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"cannot write to run_dir {tmp_path / 'run'}: No space left" in only_line(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISKS)
def test_a_disk_that_cannot_take_the_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    line = dist_train_run(tmp_path, *DISK_WORDS, prefix=in_a_small_disk(name))
    for part in DISKS[name][2]:
        assert part in line
    assert list((tmp_path / "run").iterdir()) == [], "the disk was not mounted"
