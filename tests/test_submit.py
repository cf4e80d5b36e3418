"""`dist-train submit`: what reaches sbatch, what a job runs, what is refused before the queue."""

import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import submission, submitted_code
from launch.job_record import read_records
from launch.job_settings import minutes_of
from launch.payload import Payload
from launch.submit import main
from launch.submitted_code import git_state
from tests.fake_slurm import FakeSlurm
from tests.mistakes import only_line

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "data"
GPUS = ["--gpus-per-node", "2"]
CPUS = ["--tasks-per-node", "2"]
RUN = ["experiment=cifar10_tutorial", "train.epochs=1"]
CASES = {
    "one_task_for_each_gpu": [
        *("--nodes", "4", "--gpus-per-node", "8", "--cpus-per-task", "7", "--time", "1-12"),
        *("--partition", "gpu", "--account", "me", "--qos", "high", "--mem", "0", "--exclusive"),
        *RUN,
    ],
    "torchrun_on_two_to_four_nodes": [
        *("--shape", "torchrun", "--nodes", "2-4", "--gpus-per-node", "a100:4"),
        *("--cpus-per-task", "6", "--constraint", "ib", "--exclude", "node[3,9]"),
        *("--nodelist", "node1", "--comment", "it's mine", "--reservation", "r 1"),
        *("--dependency", "afterok:5", "--setup", "module load 'cuda'", *RUN),
    ],
    "container_on_cpus": [
        *("--tasks-per-node", "3", "--python", "python", "--name", "mine"),
        *("--srun-arg=--container-image=a b.sqsh", "--srun-arg=--mpi=none"),
        *("--sbatch-arg=--mail-type=END", "--sbatch-arg=--spread-job", *RUN),
    ],
    "sweep": [*GPUS, "--array-parallelism", "2", *RUN, "optim.lr=0.1,0.2", "seed=range(2)"],
    "chain": [*GPUS, "--chain", "3", *RUN],
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(_folder(tmp_path / "work"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return FakeSlurm(tmp_path / "slurm", sys.executable, monkeypatch)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return what a submission that must work writes."""
    assert main(list(words)) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out


def dry_script(text: str) -> str:
    """Return the script that a dry run shows first."""
    return text.partition("\n# On the job's first node")[0]


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def repository(folder: Path) -> Path:
    git(_folder(folder), "init", "-q")
    (folder / ".gitignore").write_text("ignored.py\n")
    (folder / "mine.py").write_text("def value(): return 1\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "x")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_what_is_submitted(name: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *CASES[name], "--dry-run")
    text = text.replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "/HERE")
    text = re.sub(r"(run folder: .*-)[0-9a-f]{8}\n", r"\1HASH\n", text)
    assert text == (GOLDEN / f"submit_{name}.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_shows_to_the_byte_what_sbatch_gets(
    name: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, *CASES[name], "--dry-run")
    assert slurm.calls("sbatch", "srun") == []
    assert list(Path.cwd().iterdir()) == []
    shown(capsys, *CASES[name])
    scripts = slurm.scripts()
    assert scripts[0] == dry_script(text)
    if name == "chain":
        follower = text.partition("of the chain:\n")[2]
        for number, before in ((1, "77"), (2, "78")):
            wanted = follower.replace("FIRST_JOB", "77").replace("JOB_BEFORE", before)
            assert scripts[number] == wanted
    assert len(scripts) == (3 if name == "chain" else 1)


def test_a_dry_run_needs_no_slurm_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.cli import main; code = main(); "
        "assert not {'torch', 'numpy'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "submit", *CASES["sweep"], "--dry-run"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_it_says_how_to_follow_the_job(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    said = shown(capsys, *GPUS, *RUN, "run_dir=runs/x")
    assert said.splitlines() == [
        "job          77",
        "run folder   runs/x",
        "output       runs/jobs/77.out",
        "follow it    dist-train jobs 77",
        "             dist-train logs -f 77",
        "             dist-train cancel 77",
    ]
    [script] = slurm.scripts()
    assert f"#SBATCH --output={Path.cwd()}/runs/jobs/%j.out\n" in script


def test_a_job_inherits_nothing_of_the_allocation_it_is_submitted_from(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_GPUS_PER_NODE", "SLURM_CONF", "MINE"):
        monkeypatch.setenv(name, "5")
    shown(capsys, *CPUS, *RUN)
    [inherited] = slurm.environments()
    assert [name for name in inherited if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert inherited["MINE"] == "5"
    assert os.environ["SLURM_NTASKS"] == "5"


def test_what_is_remembered_of_a_job(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    before = time.time()
    shown(capsys, *GPUS, "--name", "n", *RUN, "run_dir=x", "model.args.api_key=hunter2hunter2")
    [record] = read_records(Path("runs/jobs"))
    assert (record.job_id, record.name, record.run_dir) == ("77", "n", "x")
    assert record.words == (*RUN, "run_dir=x", "model.args.api_key=[redacted]")
    assert (record.command, record.cwd, record.snapshot) == ("submit", str(Path.cwd()), None)
    assert record.output == f"{Path.cwd()}/runs/jobs/77.out"
    assert before <= record.submitted <= time.time()
    assert (record.array_index, record.overrides, record.chain) == (None, (), "")
    pickled = Path("runs/jobs/submitit/77_submitted.pkl")
    assert b"hunter2hunter2" in pickled.read_bytes(), "the job needs it"
    assert stat.S_IMODE(pickled.stat().st_mode) == 0o600


def test_the_elements_of_a_sweep(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, *CASES["sweep"])
    assert "job          77, an array of 4, at most 2 at a time" in said
    assert "output       runs/jobs/77_*.out" in said
    assert "dist-train logs -f 77_0" in said
    records = read_records(Path("runs/jobs"))
    assert [r.job_id for r in records] == ["77_0", "77_1", "77_2", "77_3"]
    assert [r.array_index for r in records] == [0, 1, 2, 3]
    product = [(f"optim.lr={lr}", f"seed={seed}") for lr in (0.1, 0.2) for seed in (0, 1)]
    assert [r.overrides for r in records] == product
    assert len({r.run_dir for r in records}) == 4
    assert records[3].output.endswith("/77_3.out")
    for record, overrides in zip(records, product, strict=True):
        pickled = Path(f"runs/jobs/submitit/{record.job_id}_submitted.pkl")
        payload = pickle.loads(pickled.read_bytes()).function
        assert payload.words == record.words == (*RUN, *overrides)


def test_the_elements_of_a_sweep_in_a_named_folder(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["optim.lr=0.1,0.2", "run_dir='a b'", "data.root=x/y,z"]
    shown(capsys, *GPUS, *RUN, *sweep)
    records = read_records(Path("runs/jobs"))
    assert [r.run_dir for r in records] == [
        "a b/optim.lr-0.1+data.root-x_y",
        "a b/optim.lr-0.1+data.root-z",
        "a b/optim.lr-0.2+data.root-x_y",
        "a b/optim.lr-0.2+data.root-z",
    ]
    one = shown(capsys, *GPUS, *records[0].words, "--dry-run")
    assert f"run folder: {records[0].run_dir}\n" in one, "its words alone make the same run"
    assert "--array" not in one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("optim.lr=0.10,1e30, 2", ["0.10", "1e30", "2"]),
        ("optim.betas=[0.9,0.99],[0.8,0.9]", ["[0.9,0.99]", "[0.8,0.9]"]),
        ("data.root='a,b',c", ["'a,b'", "c"]),
        ("optim.lr=choice(0.1,0.2)", ["0.1", "0.2"]),
        ("seed=range(3)", ["0", "1", "2"]),
        ("optim.lr=tag(x,choice(1e9,2))", ["1000000000.0", "2"]),
    ],
)
def test_values_are_spelt_as_the_user_did(
    sweep: str, values: list[str], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, *GPUS, *RUN, sweep, "run_dir=x")
    key = sweep.partition("=")[0]
    records = read_records(Path("runs/jobs"))
    assert [r.overrides for r in records] == [(f"{key}={value}",) for value in values]


def test_no_gpus_in_place_of_those_of_the_cluster(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cluster", "eight_gpus", "--gpus-per-node", "0", *CPUS, *RUN, "--dry-run"]
    text = shown(capsys, *words)
    assert "--gpus" not in text
    assert "#SBATCH --ntasks-per-node=2\n" in text
    assert main(["--gpus-per-node", "0", *RUN]) == 2
    assert "how many ranks a node has is not said" in only_line(capsys.readouterr().err)


def test_the_users_words_win(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*GPUS, *RUN, "--time", "unlimited", "--sbatch-arg=--no-requeue"]
    for name in ("OUTPUT", "JOB_NAME", "TIMELIMIT", "ARRAY_INX", "REQUEUE", "WAIT"):
        monkeypatch.setenv(f"SBATCH_{name}", "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")  # nothing else is asked for
    said = shown(capsys, *words, "--sbatch-arg=--export=NONE")
    [script], [environment] = slurm.scripts(), slurm.environments()
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [line for line in lines if "requeue" in line] == ["#SBATCH --no-requeue"]
    assert [line for line in lines if "time" in line] == ["#SBATCH --time=UNLIMITED"]
    assert "#SBATCH --export=NONE" in lines
    assert [name for name in environment if name.startswith("SBATCH_")] == ["SBATCH_ACCOUNT"]
    aside = "SBATCH_ARRAY_INX, SBATCH_JOB_NAME, SBATCH_OUTPUT, SBATCH_REQUEUE, SBATCH_TIMELIMIT"
    assert f"left aside   {aside}, SBATCH_WAIT: submit's own options hold\n" in said
    assert f"# Left aside, as the lines above hold: {aside}" in shown(capsys, *words, "--dry-run")
    (_folder(Path("conf/cluster")) / "mine.yaml").write_text("array_parallelism: 4\n")
    shown(capsys, "--config-dir", "conf", "--cluster", "mine", *GPUS, *RUN, "--dry-run")


def test_a_controller_that_does_not_answer_has_refused_nothing(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "Batch job submission failed: Unable to contact slurm controller (connect failure)"
    slurm.refuse("sbatch", f"sbatch: error: {told}")
    assert main([*GPUS, *RUN]) == 2
    line = only_line(capsys.readouterr().err)
    assert line == f"SLURM does not answer ({told}): nothing is submitted, try again later"


def test_a_folder_of_ones_own_clusters(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (_folder(Path("conf/cluster")) / "mine.yaml").write_text(
        "nodes: 2\ngpus_per_node: 4\ntime: 4:00:00\npartition: 010\nexclusive: true\n"
        "setup: [module load a]\n"
    )
    mine = ["--config-dir", "conf", "--cluster", "mine", *RUN, "--dry-run"]
    text = shown(capsys, *mine, "--nodes", "3", "--setup", "module load b")
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=240",
        "#SBATCH --partition=010",
        "#SBATCH --exclusive",
        "module load a\nmodule load b",
    ):
        assert f"\n{line}\n" in text
    assert "--config-dir conf\n" in text, "the ranks read the same groups"
    assert "--cluster" not in text
    (Path("conf/cluster") / "default.yaml").write_text("gpus_per_node: 5\n")
    assert "--gpus-per-node=5\n" in shown(capsys, "--config-dir", "conf", *RUN, "--dry-run")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        *(("90", 90), ("90:30", 91), ("0:30", 1), ("04:00:00", 240), ("00:00:01", 1)),
        *(("1-0", 1440), ("2-03", 3060), ("1-02:30", 1590), ("1-02:30:30", 1591)),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


REFUSED = {
    "misspelt key": ([*GPUS, "optm.lr=1"], "unknown key 'optm.lr': did you mean optim.lr?"),
    "one element of a sweep": ([*GPUS, "optim.lr=0.1,-1"], "optim.lr=-1: optim.lr=-1.0 is out of"),
    "batch smaller than the ranks": (
        ["--nodes", "4", *GPUS, "train.global_batch_size=6"],
        "smaller than world_size (= 8)",
    ),
    "a number of nodes that it may get": (
        ["--nodes", "2-4", *GPUS, "train.order=fixed"],
        "world_size (= 6) must be one of",
    ),
    "no ranks": (RUN, "give --gpus-per-node N, or --tasks-per-node N"),
    "ranks that share a GPU": ([*GPUS, "--tasks-per-node", "4"], "give at most 2 tasks"),
    "GPUs that are not asked for": ([*CPUS, "device=cuda"], "device=cuda needs GPUs"),
    "nodes": ([*GPUS, "--nodes", "4-2"], "--nodes=4-2 must be a number like 4, or a range"),
    "GPUs": (["--gpus-per-node", "many"], "--gpus-per-node=many must be a number like 8"),
    "cores": ([*GPUS, "--cpus-per-task", "0"], "--cpus-per-task=0 is out of range"),
    "cores in words": ([*GPUS, "--cpus-per-task", "x"], "invalid int value: 'x'"),
    "time": ([*GPUS, "--time", "soon"], "--time=soon is no time limit: write it as MINUTES"),
    "no time": ([*GPUS, "--time", "0:00:00"], "--time=0:00:00 leaves no time"),
    "two lines": ([*GPUS, "--comment", "a\nb"], "--comment has a line break"),
    "sbatch's own name of an option": (
        [*GPUS, "--sbatch-arg=--job-name=foo"],
        "--sbatch-arg=--job-name=foo is not for sbatch's own words: give --name foo to submit",
    ),
    "the beginning of it": ([*GPUS, "--sbatch-arg=--job=foo"], "give --name foo to submit"),
    "sbatch's tasks": ([*GPUS, "--sbatch-arg=--ntasks-per-node=4"], "give --tasks-per-node 4 to"),
    "an array": ([*GPUS, "--sbatch-arg=--array=1-2"], "several values of a key, as in seed=1,2,3"),
    "an output": ([*GPUS, "--sbatch-arg=--output=x"], "where dist-train logs looks for it"),
    "a sweep's option": ([*GPUS, "--array-parallelism", "2"], "--array-parallelism=2 is for a"),
    "sbatch's option as submit's": (
        [*GPUS, "--ntasks-per-node", "4"],
        "unrecognized arguments: --ntasks-per-node: give --tasks-per-node to submit",
    ),
    "a setting as an option": ([*GPUS, "--lr", "0.1"], "--lr: settings are written optim.lr=0.1"),
    "sbatch's short option": ([*GPUS, "-J", "foo"], "give --name to submit"),
    "sbatch's unknown option": ([*GPUS, "--hold"], "is given as --sbatch-arg=--hold"),
    "variables kept from the ranks": ([*GPUS, "--srun-arg=--export=NONE"], "--export=ALL,NAME="),
    "sbatch's option": ([*GPUS, "--sbatch-arg=x"], "--sbatch-arg=x must have the form --option"),
    "unknown option": ([*GPUS, "--gpu-per-task=1"], "unrecognized arguments: --gpu-per-task=1"),
    "misspelt cluster": ([*GPUS, "--cluster", "defalt"], "did you mean default?"),
    "cluster as a setting": ([*GPUS, "cluster=default"], "dist-train submit --cluster default"),
    "a range without end": ([*GPUS, "optim.lr=interval(0,1)"], "write the values"),
    "elements in one folder": (
        [*GPUS, "log_every=1,2"],
        "log_every=1 and log_every=2 would share the run folder",
    ),
    "chain of a sweep": ([*GPUS, "--chain", "2", "seed=1,2"], "continues one run, this is a sweep"),
    "chain of none": ([*GPUS, "--chain", "0"], "--chain=0 is out of range"),
    "settings of a sweep": ([*GPUS, "--print-config", "seed=1,2"], "shows one run"),
    "snapshot without git": ([*GPUS, "--snapshot"], "is in no git repository"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_before_the_queue(
    name: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words, cure = REFUSED[name]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert cure in only_line(err)
    assert out == ""
    assert slurm.calls("sbatch", "srun", "scontrol") == []
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpus_per_nod: 8", "mine.yaml: unknown key 'gpus_per_nod': did you mean gpus_per_node?"),
        ("cpus_per_task: many", "mine.yaml: cpus_per_task=many has the wrong type"),
        ("shape: mpi", "mine.yaml: shape=mpi is not a choice: choose one of srun, torchrun"),
        ("setup: module load", "mine.yaml: setup=module load has the wrong type"),
        ("- nodes: 1", "mine.yaml is no mapping of settings"),
        ("nodes: [", "mine.yaml: while parsing"),
    ],
)
def test_a_mistake_in_a_file_of_a_cluster_is_one_line(
    text: str, told: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (_folder(Path("conf/cluster")) / "mine.yaml").write_text(text)
    assert main([*GPUS, "--config-dir", "conf", "--cluster", "mine"]) == 2
    assert told in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["sweep", "one_task_for_each_gpu"])
def test_what_sbatch_refuses_is_one_line_and_leaves_nothing(
    name: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.refuse(
        "sbatch",
        "sbatch: error: invalid partition specified: gpu\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
    )
    assert main(CASES[name]) == 2
    assert only_line(capsys.readouterr().err) == (
        "SLURM refuses the job: invalid partition specified: gpu; "
        "Batch job submission failed: Invalid partition name specified"
    )
    assert len(slurm.calls("sbatch")) == 1
    assert [p.name for p in Path("runs").rglob("*") if p.is_file()] == [".lock"]


def test_a_folder_that_cannot_be_written(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").touch()
    assert main([*GPUS, *RUN, "--jobs-dir", "taken"]) == 2
    line = only_line(capsys.readouterr().err)
    assert "'" + str(Path("taken").absolute()) in line
    assert "choose another --jobs-dir" in line
    assert slurm.calls("sbatch") == []


def test_a_chain_that_breaks_says_how_far_it_came(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = submission.submit

    def once(job: submission.Submission) -> list[str]:
        ids = write(job)
        slurm.refuse("sbatch", "sbatch: error: QOSMaxSubmitJobPerUserLimit\n")
        return ids

    monkeypatch.setattr("launch.submit.submit", once)
    assert main(CASES["chain"]) == 2
    out, err = capsys.readouterr()
    assert "job          77\n" in out
    assert "the chain ends with job 77: SLURM refuses the job: QOSMax" in only_line(err)
    assert [r.job_id for r in read_records(Path("runs/jobs"))] == ["77"]


def test_the_jobs_of_a_chain_know_each_other(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, *CASES["chain"], "--dependency", "afterok:5")
    first, *followers = slurm.scripts()
    assert "--dependency=afterok:5\n" in first
    assert "DIST_TRAIN_CHAIN" not in first
    for script, before in zip(followers, ("77", "78"), strict=True):
        assert f"#SBATCH --dependency=afterany:{before}\n" in script
        assert "export DIST_TRAIN_CHAIN=slurm-77\n" in script
    assert [r.chain for r in read_records(Path("runs/jobs"))] == ["77"] * 3


def test_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main([*GPUS, *RUN]) == 2
    assert "sbatch is not here: submit where SLURM's commands" in only_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_without_submitit(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    assert main([*GPUS, *RUN]) == 2
    assert "pip install submitit" in only_line(capsys.readouterr().err)


def run_job(slurm: FakeSlurm, srun: str, script: str) -> "subprocess.Popen[str]":
    """Start a submitted script as SLURM does on a job's first node, with another srun."""
    path = slurm.folder / "bin" / "srun"
    path.write_text(f"#!/bin/bash\n{srun}")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    return subprocess.Popen(
        ["bash", "-c", script],
        env={"PYTHONPATH": str(ROOT)} | kept | {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_job_starts_the_ranks_and_ends_with_their_code(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, *GPUS, *RUN, "run_dir='a b'")
    slurm.job("77", "RUNNING")
    job = run_job(slurm, 'printf "%s\\n" "$@" > started; exit 2\n', slurm.scripts()[0])
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 2, out
    assert "Traceback" not in out
    started = Path("started").read_text().splitlines()
    assert started[:2] == ["--kill-on-bad-exit=1", "--ntasks-per-node=2"]
    assert started[2:] == [sys.executable, "-m", "dist_train", *RUN, "run_dir='a b'"]


def test_the_script_outlives_the_signals_of_a_preemption(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, *GPUS, *RUN)
    slurm.job("77", "RUNNING")
    srun = "touch started; until [ -e go ]; do sleep 0.05; done; touch saved; exit 2\n"
    job = run_job(slurm, srun, slurm.scripts()[0])
    end = time.monotonic() + 60
    while not Path("started").exists():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    for number in (signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        job.send_signal(number)  # to the shell alone
    time.sleep(0.2)
    assert not Path("saved").exists()
    Path("go").touch()
    out, _ = job.communicate(timeout=60)
    assert Path("saved").exists()
    assert job.returncode == 2, out


def called(payload: Payload, monkeypatch: pytest.MonkeyPatch) -> int:
    """Call what submitit calls, with ranks that end with 93; returns the process's exit code."""
    monkeypatch.setattr("launch.batch.run_job", lambda start, words: 93)
    with pytest.raises(SystemExit) as ended:
        payload()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_code_that_changed_since_is_told_once(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository(Path.cwd() / "mine"))
    shown(capsys, *GPUS, *RUN)
    [record] = read_records(Path("runs/jobs"))
    assert record.git[0] == git_state(Path.cwd(), Path("runs/jobs"))
    assert (record.git[0].root, record.git[0].dirty) == (str(Path.cwd()), False)
    payload = pickle.loads(Path("runs/jobs/submitit/77_submitted.pkl").read_bytes()).function
    run = _folder(Path("runs/x/log"))
    (run.parent / "environment.json").write_text("{}")
    (run / "hook.py").write_text("what a job writes is no code")
    assert called(payload, monkeypatch) == 93
    assert capsys.readouterr().out == ""
    Path("mine.py").write_text("def value(): return 2\n")
    assert called(payload, monkeypatch) == 93
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("dist-train: warning: the code in ")
    assert re.search(
        r"\(commit [0-9a-f]{8}, now commit [0-9a-f]{8} with changes [0-9a-f]{8}\)", out
    )
    git(Path.cwd(), "checkout", "mine.py")
    Path("another.py").write_text("import mine\n")
    assert git_state(Path.cwd(), Path("runs/jobs")).dirty
    assert called(payload, monkeypatch) == 93
    assert "has changed since" in capsys.readouterr().out, "a file that git does not know"
    monkeypatch.setenv("PATH", "")
    assert called(payload, monkeypatch) == 93
    assert capsys.readouterr().out == "", "a node without git says nothing"


@pytest.fixture
def fork(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of the user's with this project's code in it, and the current folder below."""
    top = Path.cwd() / "fork"
    for name in ("dist_train", "launch", "configs"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    repository(top)
    below = _folder(top / "project")
    (below / "net.py").write_text("def value(): return 1\n")
    (below / "ignored.py").write_text("def value(): return 'not in git'\n")
    (_folder(below / "conf" / "optim") / "mine.yaml").write_text("lr: 0.5\n")
    monkeypatch.chdir(below)
    monkeypatch.setenv("PYTHONPATH", str(top))
    return top


WHAT_IS_IMPORTED = """
import sys, launch, dist_train, mine
from dist_train.config.importing import import_callable
assert import_callable("ignored:value", "x")() == "not in git", "what has no copy is still found"
value = import_callable("net:value", "x")()  # before anybody has imported it
import net
print(mine.value(), net.value(), value, launch.__file__,
      dist_train.__file__, sep="\\n")
"""


@pytest.mark.slow
def test_a_snapshot_is_what_runs_whatever_is_edited_meanwhile(
    fork: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*GPUS, *RUN, "--snapshot", "--config-dir", "conf", "optim=mine"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "submit", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [record] = read_records(Path("runs/jobs"))
    assert record.snapshot is not None
    copy = Path(record.snapshot)
    assert copy.parent == Path("runs/jobs").absolute()
    assert copy.name.endswith("-code")
    assert f"code         runs/jobs/{copy.name}\n" in done.stdout
    assert record.words[-2:] == ("--config-dir", f"{copy}/0/fork/project/conf")
    for path in ("mine.py", "project/net.py", "launch/cli.py"):
        (fork / path).write_text("def value(): return 2\n")
    slurm.job("77", "RUNNING")
    (copy / "0" / "fork" / "probe.py").write_text(WHAT_IS_IMPORTED)
    probe = f"{sys.executable} -m probe > found; exit 2\n"  # as the ranks are started
    job = run_job(slurm, probe, slurm.scripts()[0])
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 2, out
    assert Path("found").read_text().splitlines() == [
        *("1", "1", "1"),
        f"{copy}/0/fork/launch/__init__.py",
        f"{copy}/0/fork/dist_train/__init__.py",
    ]
    assert "has changed" not in out
    assert Path.cwd() == fork / "project", "the folder of the job is that of the submission"


def test_a_snapshot_copies_what_git_lists_and_no_output_of_jobs(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = repository(Path.cwd() / "mine")
    monkeypatch.chdir(top)
    monkeypatch.setattr(submitted_code, "INSTALLED", top)
    (top / "new.py").touch()
    (top / "ignored.py").touch()
    (top / "link").symlink_to("mine.py")
    (_folder(top / "deep er") / "x.py").write_text("x")
    (_folder(top / "runs/x") / "environment.json").touch()
    (_folder(top / "runs/x/checkpoints") / "state.pt").touch()
    (_folder(top / "runs/jobs") / "77.json").touch()
    (_folder(top / "runs/jobs/20260101-120000-9-code/0/mine") / "mine.py").touch()
    (_folder(top / "sweep/jobs") / "5.json").touch()  # --jobs-dir sweep/jobs, of another day
    (_folder(top / "sweep/jobs/submitit") / ".lock").touch()
    (_folder(top / "gone/20260101-120000-9-code/0/mine") / "mine.py").touch()  # the rest is deleted
    (repository(top / "submodule") / "loose.py").touch()
    (top / "gone.py").touch()
    git(top, "add", "gone.py", "submodule")
    (top / "gone.py").unlink()
    snapshot = submitted_code.Snapshot(Path("jobs of today"))
    assert not snapshot.folder.exists()
    snapshot.take()
    copy = snapshot.folder / "0" / "mine"
    found = {str(p.relative_to(copy)) for p in copy.rglob("*") if not p.is_dir()}
    inner = {"submodule/.gitignore", "submodule/mine.py", "submodule/loose.py"}
    assert found == {".gitignore", "mine.py", "new.py", "link", "deep er/x.py"} | inner
    assert (copy / "link").readlink() == Path("mine.py")


def test_a_snapshot_of_data_is_refused(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository(Path.cwd() / "mine"))
    with Path("pictures.bin").open("wb") as file:
        file.truncate(submitted_code.MAX_SNAPSHOT_BYTES + 1)  # a hole, of no blocks
    assert main([*GPUS, *RUN, "--snapshot"]) == 2
    line = only_line(capsys.readouterr().err)
    assert "more than 1 GiB of code: let .gitignore name the data" in line
    assert "pictures.bin" in line
    assert not Path("runs").exists()


def test_a_package_installed_inside_of_a_repository_is_no_code_of_it(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = repository(Path.cwd() / "other")
    (other / ".gitignore").write_text(".venv/\n")
    (_folder(other / ".venv/launch") / "__init__.py").touch()
    monkeypatch.chdir(repository(Path.cwd() / "mine"))
    monkeypatch.setattr(submitted_code, "INSTALLED", other / ".venv")
    assert [s.root for s in submitted_code.git_states(Path("jobs"))] == [str(Path.cwd())]
    monkeypatch.setattr(submitted_code, "INSTALLED", ROOT)
