"""What `dist-train run` does about signals, with a shell in torchrun's place."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train.agent import _once
from dist_train.preemption import SIGNALS, heard, listen_for_stop
from launch import supervise as supervisor
from launch.supervise import INTERRUPTED, STOPS, supervise

BEGIN = 'touch "$(dirname "$DIST_TRAIN_VERDICT")/begun"'
STATUS = (
    'mkdir -p "$DIST_TRAIN_RUN_DIR"; printf \'{"chain": "%s", "attempt": 0, "state": "preempted", '
    '"step": 7, "exit_code": 0}\' "$DIST_TRAIN_CHAIN" > "$DIST_TRAIN_RUN_DIR/status.json"'
)
INTERRUPT = "trap '' INT; for i in 1 2 3; do kill -INT $PPID; sleep 0.2; done; sleep 60"


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(supervisor, "UNSTARTED_SEC", 0.5)
    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def supervised(script: str, run_dir: Path) -> int:
    return supervise(["sh", "-c", script], dict(os.environ), run_dir)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_is_inherited_as_ignored_stays_ignored(
    number: signal.Signals, tmp_path: Path
) -> None:
    script = f"kill -{number.name[3:]} $PPID; sleep 0.2; exit 7"
    assert supervised(script, tmp_path) == 0, "it was stopped"
    signal.signal(number, signal.SIG_IGN)
    assert supervised(script, tmp_path) == 7
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_a_rank_ignores_what_it_was_started_to_ignore(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with listen_for_stop() as stop:
        os.kill(os.getpid(), number)
        assert not stop.asked
        assert heard() is stop
        with listen_for_stop() as again:
            assert again is stop
        os.kill(os.getpid(), next(other for other in SIGNALS if other is not number))
        assert stop.asked
    assert signal.getsignal(number) is signal.SIG_IGN


def test_torchruns_handler_is_called_once_and_not_for_what_is_ignored() -> None:
    told: list[int] = []
    calm = _once(lambda number, frame: told.append(number), {signal.SIGTERM})
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
        calm(number, None)
    assert told == [signal.SIGTERM]


def test_what_has_nothing_to_save_and_hears_no_signal_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervised("trap '' TERM; kill -TERM $PPID; sleep 60", tmp_path) == 0
    assert capfd.readouterr().out == "stopped before the start: the same command continues\n"


def test_ranks_that_have_begun_get_the_time_that_a_save_takes(tmp_path: Path) -> None:
    script = f"{BEGIN}; trap '' TERM; kill -TERM $PPID; sleep 3; {STATUS}; touch {tmp_path}/saved"
    assert supervised(script, tmp_path) == 0
    assert (tmp_path / "saved").exists()


def test_the_third_interrupt_says_what_is_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert supervised(f"{BEGIN}; {INTERRUPT}", tmp_path) == INTERRUPTED
    assert "quit at once: there is no checkpoint yet" in capfd.readouterr().err
    for step in (12, 7):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step_00000019").mkdir()
    assert supervised(f"{BEGIN}; {INTERRUPT}", tmp_path) == INTERRUPTED
    assert "from the newest checkpoint, that of step 12" in capfd.readouterr().err
    assert supervised(f"{BEGIN}; {STATUS}; {INTERRUPT}", tmp_path) == 0, "the save was over"
    assert capfd.readouterr().err == ""
