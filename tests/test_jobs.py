"""The verbs about submitted jobs: jobs, logs, cancel, requeue."""

import json
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch import cancel, job_states, jobs, logs, requeue, submit
from launch.job_record import JobRecord, read_records, write_record
from tests.fake_slurm import FakeSlurm
from tests.mistakes import only_line

JOBS = Path("runs/jobs")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return FakeSlurm(tmp_path / "slurm", sys.executable, monkeypatch)


def submitted(job_id: str, run_dir: str = "runs/x", **fields: Any) -> JobRecord:
    """Remember a job as if it had been submitted here."""
    record = JobRecord(
        job_id=job_id,
        name="name",
        run_dir=run_dir,
        words=("seed=1",),
        command="submit",
        cwd=str(Path.cwd()),
        output=f"{JOBS}/{job_id}.out",
        **fields,
    )
    write_record(JOBS, record)
    return record


def trained(
    run_dir: str, chain: str, *, metrics: list[dict[str, Any]] | None = None, **status: Any
) -> Path:
    """Write what a run leaves in its folder."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    told = {"state": "running", "step": 0, "time": time.time(), "attempt": 0, "chain": chain}
    (folder / "status.json").write_text(json.dumps(told | status))
    (folder / "chain.json").write_text(json.dumps({"chain": chain, "attempt": told["attempt"]}))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(m)}\n" for m in metrics or []))
    return folder


def finished(run_dir: str, chain: str, *, test: float, validation: float | None) -> None:
    folder = trained(run_dir, chain, state="finished", step=90, metrics=[{"step": 90}])
    summary = {"eval_accuracy": test, "best_val_accuracy": validation}
    (folder / "summary.json").write_text(json.dumps(summary))


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """Return the lines that `dist-train jobs` writes, cut at two spaces or more."""
    assert jobs.main(list(words)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return only_line(err)


def test_a_record_is_read_as_it_was_written(slurm: FakeSlurm) -> None:
    records = [submitted("9"), submitted("77_3", overrides=("a=1",)), submitted("77_10")]
    (JOBS / "78.json").write_text('{"job_id": "78", "na')
    (JOBS / "79.json").write_text('{"job_id": "79"}')
    (JOBS / "notes.json").write_text("{}")
    newer = json.loads((JOBS / "9.json").read_text()) | {"of_a_newer_version": 1}
    (JOBS / "9.json").write_text(json.dumps(newer))
    assert read_records(JOBS) == records
    assert read_records(Path("nowhere")) == []


@pytest.mark.parametrize(
    "wrong",
    [
        *({"run_dir": [5]}, {"words": "seed=1"}, {"submitted": "today"}, {"job_id": "mine"}),
        *({"output": None}, {"git": [{"root": 1}]}, {"chain": ["77"]}, {"overrides": {"a": 1}}),
    ],
)
def test_a_record_of_another_kind_stops_nobody(
    wrong: dict[str, Any], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted("77", "runs/a")
    submitted("78", "runs/b")
    spoilt = json.loads((JOBS / "78.json").read_text()) | wrong
    (JOBS / "78.json").write_text(json.dumps(spoilt))
    (JOBS / "79.json").write_text("[1]")
    assert [row[0] for row in rows(capsys)] == ["job", "77"]


def test_a_folder_that_tells_nonsense_stops_nobody(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(("[]", '{"chain": "slurm-77", "step": "x", "time": "now"}')):
        submitted(str(77 + number), f"runs/{number}")
        trained(f"runs/{number}", f"slurm-{77 + number}")
        (Path(f"runs/{number}") / "status.json").write_text(text.replace("77", str(77 + number)))
        (Path(f"runs/{number}") / "chain.json").write_text('{"attempt": "y"}')
        (JOBS / f"{77 + number}.out").touch()
    assert [row[0] for row in rows(capsys)] == ["job", "77", "78"]


def test_how_jobs_stand(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    submitted("77", "runs/a")
    submitted("78", "runs/b")
    submitted("79_0", "runs/c", overrides=("optim.lr=0.1",))
    submitted("80", "runs/d")
    slurm.job("77", "RUNNING", restarts=1)
    slurm.job("78", "PENDING", reason="Resources")
    slurm.job("79_0", "FAILED")
    slurm.job("80", "COMPLETED")
    many = [{"step": step, "train/loss": 9.0, "filler": "x" * 500} for step in range(300)]
    last = [{"step": 340, "train/loss": 0.25}, {"step": 345, "perf/images_per_sec": 3.0}]
    trained("runs/a", "slurm-77", metrics=many + last, attempt=2)
    with (Path("runs/a") / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "train/lo')  # torn
    (JOBS / "77.out").write_text("step 20/400  epoch 0.1\nstep 340/500  epoch 1\n")
    trained("runs/c", "slurm-79_0", state="failed", step=5, reason="rank 1 failed at\nstep 5: boom")
    finished("runs/d", "slurm-80", test=0.5, validation=0.75)
    assert rows(capsys) == [
        ["job", "name", "SLURM", "run", "step", "last", "restarts", "run folder"],
        ["77", "name", "RUNNING", "running", "345/500", "loss 0.25", "2", "runs/a"],
        ["78", "name", "PENDING (Resources)", "-", "-", "-", "0", "runs/b"],
        ["79_0", "name optim.lr=0.1", "FAILED", "failed", "5", "-", "0", "runs/c"],
        ["rank 1 failed at step 5: boom"],
        ["80", "name", "COMPLETED", "finished", "90", "accuracy 50.00%", "0", "runs/d"],
    ]
    assert len(slurm.calls("squeue", "scontrol", "sacct")) == 1, "one question for all jobs"
    assert [row[0] for row in rows(capsys, "79_0")[1:]] == ["79_0", "rank 1 failed at step 5: boom"]
    assert [row[0] for row in rows(capsys, "runs/d")[1:]] == ["80"]


def test_elements_that_were_cancelled_while_they_waited(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        submitted(f"77_{number}", f"runs/{number}")
    slurm.job("77_0", "RUNNING")
    slurm.job("77", "CANCELLED")  # as squeue lists all that had not started
    assert [row[2] for row in rows(capsys)[1:]] == ["RUNNING", "CANCELLED", "CANCELLED"]


def test_jobs_that_slurm_has_forgotten(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted("77", "runs/a")
    submitted("78", "runs/b")
    trained("runs/a", "slurm-77", state="preempted", step=7)
    trained("runs/b", "slurm-78", state="running", step=8)
    table = rows(capsys)
    assert table[1][2:5] == ["-", "preempted", "7"]
    assert table[2][2:5] == ["-", "died", "8"], "nothing runs that SLURM does not know"
    assert len(slurm.calls("sacct")) == 1, "accounting is asked, and is off"


def test_without_slurm(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted("77", "runs/a")
    trained("runs/a", "slurm-77", state="running", step=8)
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n")
    *table, note = rows(capsys)
    assert table[1][2:5] == ["-", "running", "8"]
    assert note[0].startswith("(SLURM does not answer: slurm_load_jobs error: Unable")
    monkeypatch.setenv("PATH", "")
    *table, note = rows(capsys)
    assert table[1][2:5] == ["-", "running", "8"]
    assert note == ["(no SLURM here; this is what the run folders say)"]


def test_a_job_refused_in_words_shows_them(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted("77", "runs/a")
    slurm.job("77", "FAILED", reason="NonZeroExitCode")
    (JOBS / "77.out").write_text("one\ndist-train: error: data.root=/x is no folder\ntwo\n")
    assert rows(capsys)[2] == ["data.root=/x is no folder"]


def test_whose_state_a_folder_shows(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    for job_id in ("77", "80", "81"):
        submitted(job_id, "runs/a")
    (JOBS / "77.out").touch()
    trained("runs/a", "slurm-80", state="running", step=8)
    slurm.job("80", "RUNNING")
    slurm.job("81", "PENDING", reason="Priority")
    table = rows(capsys)
    assert [row[3] for row in table] == ["run", "taken over", "running", "-"]
    assert [row[4] for row in table] == ["step", "-", "8", "-"]


def test_the_jobs_of_a_chain_are_one_run(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for job_id in ("77", "78", "79"):
        submitted(job_id, "runs/a", chain="77")
    slurm.job("78", "RUNNING")
    slurm.job("79", "PENDING", reason="Dependency")
    for job_id in ("77", "78"):
        (JOBS / f"{job_id}.out").touch()
    trained("runs/a", "slurm-77", step=8)
    table = rows(capsys, "runs/a")
    assert [row[0] for row in table] == ["job", "77", "78", "79"]
    assert table[1][2:5] == ["-", "taken over", "-"]
    assert table[2][2:5] == ["RUNNING", "running", "8"]
    assert table[3][2:5] == ["PENDING (Dependency)", "-", "-"]


def test_only_the_newest_unless_asked(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    for job_id in range(1, jobs.NEWEST + 4):
        submitted(str(job_id))
    table = rows(capsys)
    assert table[1][0] == "4"
    assert table[-1] == ["(3 older: --all)"]
    assert len(rows(capsys, "--all")) == 1 + jobs.NEWEST + 3


def test_jobs_for_programs(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    record = submitted("77", "runs/a", overrides=("optim.lr=0.1",))
    slurm.job("77", "RUNNING", restarts=3)
    trained("runs/a", "slurm-77", metrics=[{"step": 4, "train/loss": "nan"}])
    assert jobs.main(["--json"]) == 0
    [job] = json.loads(capsys.readouterr().out)
    assert job["job_id"] == "77"
    assert job["overrides"] == list(record.overrides)
    assert (job["slurm"], job["run"], job["step"], job["restarts"]) == ("RUNNING", "running", 4, 3)
    assert job["loss"] == "nan", "not NaN, which is no JSON"


def test_a_sweep_compared(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    words = [("optim.lr=0.1", "seed=0"), ("optim.lr=0.2", "seed=0"), ("optim.lr=0.4", "seed=0")]
    for number, overrides in enumerate([*words, ("optim.lr=9", "seed=0")]):
        submitted(f"77_{number}", f"runs/{number}", overrides=overrides)
    submitted("78", "runs/other")
    finished("runs/0", "slurm-77_0", test=0.99, validation=0.80)
    finished("runs/1", "slurm-77_1", test=0.50, validation=0.90)
    trained("runs/2", "slurm-77_2", metrics=[{"step": 3, "eval/accuracy": 0.999}])
    slurm.job("77_2", "RUNNING")
    trained("runs/3", "slurm-77_3", state="failed", step=2, reason="diverged")
    submitted("9_0", overrides=("seed=1",))
    *table, note = rows(capsys, "--compare")
    assert [row[0] for row in table[1:]] == ["*", "77_0", "77_2", "77_3"], "the newest sweep"
    assert [*table, note] == rows(capsys, "77", "--compare")
    assert table[0][1:6] == ["optim.lr", "seed", "validation", "test", "loss"]
    assert table[1][1:6] == ["77_1", "0.2", "0", "90.00%", "50.00%"]
    assert table[2][1:5] == ["0.1", "0", "80.00%", "99.00%"]
    assert [row[-2] for row in table[1:]] == ["finished", "finished", "running", "failed"]
    assert note == ["(* the best by validation accuracy)"]
    assert jobs.main(["78", "--compare"]) == 2
    assert "--compare needs a sweep" in refusal(capsys)


def test_a_sweep_without_validation_and_one_without_results(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        submitted(f"77_{number}", f"runs/{number}", overrides=(f"seed={number}",))
    assert "*" not in {row[0] for row in rows(capsys, "77", "--compare")[1:-1]}
    finished("runs/0", "slurm-77_0", test=0.5, validation=None)
    finished("runs/1", "slurm-77_1", test=0.6, validation=None)
    *table, note = rows(capsys, "77", "--compare")
    assert table[1][:2] == ["*", "77_1"]
    assert note == ["(* the best by test accuracy)"]


def test_a_job_that_nobody_knows(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (jobs, logs, requeue):
        assert verb.main(["5"]) == 2
        assert "runs/jobs has no record of '5', it holds none" in refusal(capsys)
    submitted("77")
    assert jobs.main(["runs/y"]) == 2
    assert "no record of 'runs/y', the newest there is 77" in refusal(capsys)
    assert cancel.main(["5"]) == 2
    assert "job 5 is over, or SLURM does not know it" in refusal(capsys)
    assert cancel.main(["runs/y"]) == 2
    assert "has no record of a job for 'runs/y'" in refusal(capsys)


def test_the_end_of_an_output(slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    submitted("77")
    assert logs.main(["77"]) == 2
    assert b"job 77 has written no output yet" in capfdbinary.readouterr().err
    whole = b"".join(b"line %d \xff\n" % number for number in range(5000))
    (JOBS / "77.out").write_bytes(whole + b"not whole")
    for number in (0, 1, 3, 4000):
        assert logs.main(["77", "-n", str(number)]) == 0
        wanted = (whole + b"not whole").splitlines(keepends=True)
        assert capfdbinary.readouterr().out == b"".join(wanted[len(wanted) - number :])
    assert logs.main(["runs/x", "-n", "10000"]) == 0
    assert capfdbinary.readouterr().out == whole + b"not whole"


def test_an_array_has_many_outputs(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        submitted(f"77_{number}", f"runs/{number}")
    assert logs.main(["77"]) == 2
    assert "job 77 is an array of 77_0 to 77_2: name one of them" in refusal(capsys)
    assert logs.main(["77_1", "-n", "-1"]) == 2
    assert "--lines=-1 is out of range" in refusal(capsys)


def test_an_output_followed_until_the_job_is_over(
    slurm: FakeSlurm, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "ASK_EVERY_SEC", 0.05)
    monkeypatch.setattr(logs, "LOOK_EVERY_SEC", 0.01)
    submitted("77")
    slurm.job("77", "PENDING")

    def work() -> None:
        for number in range(20):
            with (JOBS / "77.out").open("a") as file:
                file.write(f"{number}\n")
            time.sleep(0.02)
            slurm.job("77", "RUNNING" if number < 18 else "COMPLETING")
        slurm.job("77", "COMPLETED")

    thread = threading.Thread(target=work)
    thread.start()
    assert logs.main(["-f", "77"]) == 0
    assert not thread.is_alive() or "COMPLETED" in (slurm.folder / "jobs/77").read_text()
    thread.join()
    assert capfdbinary.readouterr().out.split() == [str(n).encode() for n in range(20)]


def test_ctrl_c_ends_following(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted("77")
    slurm.job("77", "RUNNING")

    def interrupt(record: JobRecord) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "_is_over", interrupt)
    assert logs.main(["-f", "77"]) == 130
    assert capsys.readouterr() == ("", "")


def asked(slurm: FakeSlurm) -> list[str]:
    """Return what was asked of SLURM beside questions."""
    calls = slurm.calls("scontrol", "scancel")
    return [" ".join(call) for call in calls if call[1] != "show"]


def test_a_running_job_saves_before_it_ends(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.job("77", "RUNNING")
    assert cancel.main(["77"]) == 0
    assert asked(slurm) == ["scontrol update JobId=77 Requeue=0", "scancel --full --signal=USR2 77"]
    said = "job 77: its ranks save and end, and SLURM does not requeue it\n"
    assert capsys.readouterr().out == said
    assert cancel.main(["77", "--now"]) == 0
    assert asked(slurm)[2:] == ["scancel 77"]


def test_a_waiting_job_is_cancelled(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    submitted("77", "runs/a")
    slurm.job("77", "PENDING", reason="Resources")
    assert cancel.main(["runs/a"]) == 0
    assert asked(slurm) == ["scancel 77"]
    assert capsys.readouterr().out == "job 77: cancelled\n"
    slurm.job("77", "CANCELLED")
    assert cancel.main(["77"]) == 2
    assert "job 77 is over" in refusal(capsys)
    assert asked(slurm) == ["scancel 77"]


def test_an_array_is_cancelled_element_by_element(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.job("77_0", "COMPLETED")
    slurm.job("77_1", "RUNNING")
    slurm.job("77_2", "COMPLETING")
    slurm.job("77_3-5%2", "PENDING")  # as scontrol lists those still waiting
    assert cancel.main(["77"]) == 0
    assert asked(slurm) == [
        "scancel 77_[3-5]",
        "scontrol update JobId=77_1 Requeue=0",
        "scancel --full --signal=USR2 77_1",
    ]
    assert "job 77_2: it is ending already (COMPLETING)\n" in capsys.readouterr().out


def test_what_would_go_on_after_a_job_is_cancelled_first(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for job_id in ("77", "78", "79"):
        submitted(job_id, "runs/a", chain="77")
    submitted("80", "runs/b", chain="80")
    slurm.job("77", "RUNNING")
    for job_id in ("78", "79", "80"):
        slurm.job(job_id, "PENDING")
    wanted = ["scancel 79", "scancel 78", "scontrol update JobId=77 Requeue=0"]
    wanted.append("scancel --full --signal=USR2 77")
    for name in ("77", "runs/a"):
        (slurm.folder / "calls").write_text("")
        assert cancel.main([name]) == 0
        assert asked(slurm) == wanted


def test_slurm_refuses_to_cancel(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.job("77", "RUNNING")
    slurm.refuse("scancel", "scancel: error: Kill job error on job id 77: Access denied\n")
    assert cancel.main(["77"]) == 2
    assert "SLURM refuses: scancel: error: Kill job error" in refusal(capsys)


def test_a_requeued_job_counts_from_zero(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted("77", "runs/a")
    folder = trained("runs/a", "slurm-77", state="failed", exit_code=93, attempt=3)
    slurm.job("77", "FAILED")
    assert requeue.main(["runs/a"]) == 0
    assert asked(slurm) == ["scontrol requeue 77"]
    assert not (folder / "chain.json").exists()
    assert (folder / "status.json").exists()
    assert capsys.readouterr().out == (
        "job 77 waits in the queue (PENDING) and continues by itself\n"
    )
    assert requeue.main(["77"]) == 0
    assert capsys.readouterr().out == "job 77 waits already (PENDING BeginTime)\n"
    assert len(asked(slurm)) == 1


def test_a_running_job_counts_until_it_has_ended(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted("77", "runs/a")
    folder = trained("runs/a", "slurm-77")
    slurm.job("77", "RUNNING", may_requeue=False)
    was_there = []

    def look(words: str) -> None:
        was_there.append((folder / "chain.json").exists())
        slurm.job("77", "PENDING", reason="BeginTime")

    monkeypatch.setattr("launch.scontrol.requeue", look)
    assert requeue.main(["77"]) == 0
    assert was_there == [True]
    assert asked(slurm) == ["scontrol update JobId=77 Requeue=1"]
    assert not (folder / "chain.json").exists()


def test_a_requeue_that_fails_is_told(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requeue, "VERIFY_SEC", 0.3)
    submitted("77", "runs/a")
    assert requeue.main(["77"]) == 2
    line = refusal(capsys)
    assert "SLURM cannot requeue job 77 any more: submit it again" in line
    assert "its words: seed=1" in line
    slurm.job("77", "COMPLETED")
    monkeypatch.setattr("launch.scontrol.requeue", lambda job_id: None)
    assert requeue.main(["77"]) == 2
    assert "does not wait in the queue after" in refusal(capsys)
    monkeypatch.undo()
    monkeypatch.chdir(slurm.folder.parent / "work")
    monkeypatch.setenv("PATH", f"{slurm.folder / 'bin'}:/usr/bin")
    slurm.refuse("scontrol", "Requested operation is presently disabled for job 77\n")
    assert requeue.main(["77"]) == 2
    assert "SLURM refuses: Requested operation is presently disabled" in refusal(capsys)


GPUS = ["--gpus-per-node", "2", "experiment=cifar10_tutorial", "train.epochs=1"]


@pytest.mark.parametrize("known", [True, False])
def test_a_job_that_slurm_cannot_requeue_is_submitted_anew(
    known: bool, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*GPUS, "run_dir=runs/a"]) == 0
    folder = trained("runs/a", "slurm-77", state="preempted")
    if known:
        slurm.job("77", "COMPLETED", may_requeue=False)  # as `cancel` leaves it
    capsys.readouterr()
    assert requeue.main(["77"]) == 0
    assert capsys.readouterr().out == (
        "job 77 is over for SLURM: submitted again as job 78, which continues the run\n"
    )
    assert not (folder / "chain.json").exists()
    assert slurm.scripts()[0] == slurm.scripts()[1]
    first, second = read_records(JOBS)
    assert (second.job_id, second.output) == ("78", f"{Path.cwd()}/{JOBS}/78.out")
    assert (second.words, second.run_dir) == (first.words, first.run_dir)
    pickles = [(JOBS / f"submitit/{job}_submitted.pkl") for job in (77, 78)]
    assert pickles[0].read_bytes() == pickles[1].read_bytes()
    assert stat.S_IMODE(pickles[1].stat().st_mode) == 0o600
    assert requeue.main(["78"]) == 0, "and that one once more"


def test_an_element_is_submitted_anew_alone(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main([*GPUS, "seed=5,6,7"]) == 0
    slurm.job("77_1", "COMPLETED", may_requeue=False)
    assert requeue.main(["77_1"]) == 0
    assert "submitted again as job 78_1" in capsys.readouterr().out
    assert slurm.calls("sbatch")[1][1:3] == ["--parsable", "--array=1"]
    again = read_records(JOBS)[-1]
    assert (again.job_id, again.overrides, again.array_index) == ("78_1", ("seed=6",), 1)
    assert (JOBS / "submitit/78_1_submitted.pkl").is_file()
    slurm.refuse("sbatch", "sbatch: error: Invalid account\n")
    assert requeue.main(["77_1"]) == 2
    assert refusal(capsys) == "SLURM refuses the job: Invalid account"


def test_a_held_job_is_told(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted("77", "runs/a")
    slurm.job("77", "FAILED")

    def hold(job_id: str) -> None:
        slurm.job(job_id, "PENDING", reason="JobHeldUser")

    monkeypatch.setattr("launch.scontrol.requeue", hold)
    assert requeue.main(["77"]) == 0
    assert capsys.readouterr().out == "job 77 is held: scontrol release 77\n"


def test_a_chain_is_requeued_by_number(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    for job_id in ("77", "78"):
        submitted(job_id, "runs/a", chain="77")
    assert requeue.main(["runs/a"]) == 2
    assert "belongs to a chain of jobs: name one of 77, 78" in refusal(capsys)


def test_the_tail_of_a_file_is_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert job_states.tail(path) == b""
    path.write_bytes(b"aaaa\nbb\ncc\n")
    assert job_states.tail(path) == b"aaaa\nbb\ncc\n"
    assert job_states.tail(path, 6) == b"cc\n"
