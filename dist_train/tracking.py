"""Where metrics go: metrics.jsonl always, the console, TensorBoard and W&B on request.

metrics.jsonl is the record of a run: lines that a full disk refuses wait in memory until it takes
them again. The others are conveniences: one that fails is switched off with one warning, and
training goes on.
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TextIO

from dist_train.config import Config, ConfigError
from dist_train.config.redact import redact
from dist_train.config.streams import is_terminal, put
from dist_train.journal import LineFile
from dist_train.wandb_tracker import WandbTracker, wandb_mode

BAR_WIDTH = 20
SHOWN_WAIT = 0.05  # of the time: less waiting for data is not shown
FULL = (errno.ENOSPC, errno.EDQUOT)

Record = Mapping[str, float | int | str | bool | None]
"""`step` (int, batches consumed) and what was measured there.

The console reads `epoch`, `train/loss`, `train/accuracy` (0..1), `perf/images_per_sec`,
`perf/data_wait`, `memory/peak_gib` and everything named `eval/...`; each may be missing.
"""


class Tracker(Protocol):
    """Takes records in the order of their steps. Used on rank 0 only; never collective."""

    def log(self, record: Record) -> None: ...

    def rewind(self, step: int, *, evaluated: bool) -> None: ...

    def close(self, *, exit_code: int) -> None: ...


class JsonlTracker:
    """Appends one JSON object a line, each with one write: a kill loses nothing already logged.

    An error of the disk is no error of the training: see journal.LineFile.

    Opening keeps the lines up to `restored_step` of what is there, in one atomic replacement, so
    that a resumed run misses and repeats no step; without `evaluated` that step's evaluation is
    dropped, as it comes again. NaN and infinities are written as strings.
    """

    def __init__(self, path: Path, *, restored_step: int, evaluated: bool = True) -> None:
        self._path = path
        self.file = self._opened(restored_step, evaluated=evaluated)

    def _opened(self, step: int, *, evaluated: bool) -> LineFile:
        if self._path.exists():
            _keep_until(self._path, step, evaluated=evaluated)
        return LineFile(self._path)

    def rewind(self, step: int, *, evaluated: bool) -> None:
        """Drop the lines after `step`: the run went back to it."""
        self.file.close()
        self.file = self._opened(step, evaluated=evaluated)

    def log(self, record: Record) -> None:
        timed = {"step": record["step"], "attempt": record.get("attempt"), "time": time.time()}
        strict = {name: _strict(value) for name, value in (timed | dict(record)).items()}
        self.file.append(json.dumps(strict, allow_nan=False))

    def close(self, *, exit_code: int) -> None:
        lost = self.file.close()
        if lost is not None:
            raise OSError(lost)


class ConsoleTracker:
    """Rewrites one line in place on a terminal, writes plain lines elsewhere."""

    def __init__(self, stream: TextIO | None, *, total_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._terminal = is_terminal(stream)
        self._bar = ""
        self._first: tuple[int, float] | None = None  # step and clock of the first record

    def log(self, record: Record) -> None:
        evaluation = [(name, value) for name, value in record.items() if name.startswith("eval/")]
        if evaluation:
            parts = [_labelled(name, value) for name, value in evaluation]
            self.message(f"evaluation at step {record['step']}: {', '.join(parts)}")
        if "train/loss" in record:
            self._show(self._progress(record))

    def message(self, text: str) -> None:
        """Write lines of their own, above the bar."""
        bar, blank = self._bar, " " * len(self._bar)
        put(self._stream, f"\r{blank}\r{text}\n{bar}" if bar else f"{text}\n")

    def rewind(self, step: int, *, evaluated: bool) -> None:
        self._first = None

    def end_bar(self) -> None:
        """Leave the bar as a line of its own: what comes stands below it."""
        if self._bar:
            put(self._stream, "\n")
            self._bar = ""

    def close(self, *, exit_code: int) -> None:
        self.end_bar()

    def _progress(self, record: Record) -> str:
        step = int(record["step"] or 0)
        now = time.monotonic()
        first_step, first_time = self._first = self._first or (step, now)
        shown = [f"{step}/{self._total_steps}"]
        if (epoch := record.get("epoch")) is not None:
            shown.append(f"epoch {_number(epoch, '.2f') if isinstance(epoch, float) else epoch}")
        for name in ("train/loss", "train/accuracy"):
            if name in record:
                shown.append(_labelled(name, record[name]))
        if isinstance(rate := record.get("perf/images_per_sec"), int | float):
            shown.append(f"{_number(rate, ',.0f')} images/s")
        wait = record.get("perf/data_wait")
        if isinstance(wait, float) and wait >= SHOWN_WAIT:
            shown.append(f"{wait:.0%} waiting for data")
        if step > first_step:
            left = (self._total_steps - step) * (now - first_time) / (step - first_step)
            shown.append(f"ETA {timedelta(seconds=max(0, round(left)))}")
        if isinstance(memory := record.get("memory/peak_gib"), int | float):
            shown.append(f"{_number(memory, '.2f')} GiB")
        if self._terminal:
            done = min(BAR_WIDTH, BAR_WIDTH * step // max(1, self._total_steps))
            shown.insert(0, f"[{'=' * done}{' ' * (BAR_WIDTH - done)}]")
        return "  ".join(shown)

    def _show(self, line: str) -> None:
        if not self._terminal:
            put(self._stream, f"step {line}\n")
        else:
            line = line[: shutil.get_terminal_size().columns - 1]  # a full line would wrap
            put(self._stream, f"\r{line.ljust(len(self._bar))}")
            self._bar = line


class TensorBoardTracker:
    """Writes event files; a reader drops the points after `restored_step` of earlier ones."""

    def __init__(self, folder: Path, *, restored_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tracking.tensorboard=true needs a package that is missing ({error}): "
                f"pip install tensorboard"
            ) from None
        self._make = lambda step: SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)
        self._writer = self._make(restored_step)

    def log(self, record: Record) -> None:
        for name, value in record.items():
            if "/" in name and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def rewind(self, step: int, *, evaluated: bool) -> None:
        self._writer.close()
        self._writer = self._make(step)

    def close(self, *, exit_code: int) -> None:
        self._writer.close()


class Trackers:
    """Passes records on to every tracker; with none it takes them and does nothing."""

    def __init__(
        self, trackers: Sequence[Tracker] = (), *, warn: Callable[[str], None] | None = None
    ) -> None:
        self._trackers = list(trackers)
        self._warn = warn or (lambda text: None)

    @property
    def is_open(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._trackers)

    def log(self, record: Record) -> None:
        for tracker in list(self._trackers):
            self._guarded(tracker, lambda t=tracker: t.log(record))

    def rewind(self, step: int, *, evaluated: bool) -> None:
        """Forget what was logged after `step`, as far as a tracker can."""
        for tracker in list(self._trackers):
            self._guarded(tracker, lambda t=tracker: t.rewind(step, evaluated=evaluated))

    def message(self, text: str, *, last: bool = False) -> None:
        """Show lines on the console: above its bar, or below it if they are the last ones."""
        for tracker in list(self._trackers):
            if isinstance(tracker, ConsoleTracker):
                if last:
                    self._guarded(tracker, tracker.end_bar)
                self._guarded(tracker, lambda t=tracker: t.message(text))

    def take_news(self) -> list[str]:
        """Return what there is to tell of metrics.jsonl since the last call."""
        journals = [t for t in self._trackers if isinstance(t, JsonlTracker)]
        return [text for journal in journals for text in journal.file.take_news()]

    def close(self, *, exit_code: int) -> None:
        """Close all; W&B takes at most `wandb_tracker.CLOSE_SEC`. A second call does nothing."""
        while self._trackers:
            tracker = self._trackers.pop(0)
            self._guarded(tracker, lambda t=tracker: t.close(exit_code=exit_code))

    def _guarded(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if isinstance(tracker, JsonlTracker):
                if not isinstance(error, OSError):
                    raise
                self._warn(str(error))
                return
            if isinstance(tracker, ConsoleTracker) and getattr(error, "errno", 0) in FULL:
                return  # standard output is a file on a full disk: it may have room again
            if tracker in self._trackers:
                self._trackers.remove(tracker)
            self._warn(
                f"{type(tracker).__name__} is off after {type(error).__name__}: {error}. "
                f"Training goes on; metrics.jsonl has every record."
            )


def open_trackers(
    config: Config,
    folder: Path,
    *,
    restored_step: int,
    evaluated: bool = True,
    wandb_id: str,
    total_steps: int,
    stream: TextIO | None,
    warn: Callable[[str], None],
) -> Trackers:
    """Open what the configuration asks for. On rank 0; other ranks use an empty `Trackers()`.

    Args:
        config: also recorded by W&B, whole but for secrets.
        folder: the run's; gets metrics.jsonl, tensorboard/ and wandb/.
        restored_step: what was logged after it is dropped (0 for a new run).
        evaluated: whether the evaluation of that very step is done; else its line is dropped too.
        wandb_id: the same at every start of the run.
        total_steps: for the progress bar.
        stream: where progress is shown.
        warn: called when an optional tracker is off or goes offline.

    Raises:
        ConfigError: an optional package is missing.
    """
    console = ConsoleTracker(stream, total_steps=total_steps)
    trackers: list[Tracker] = [
        JsonlTracker(folder / "metrics.jsonl", restored_step=restored_step, evaluated=evaluated),
        console,
    ]
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", restored_step=restored_step))
    if wandb_mode(config.tracking.wandb, os.environ) != "disabled":
        wandb = WandbTracker(
            config.tracking.wandb,
            folder,
            run_id=wandb_id,
            run_config=redact(asdict(config)),
            say=console.message,
            warn=warn,
        )
        trackers.append(wandb)
    return Trackers(trackers, warn=warn)


def _keep_until(path: Path, last_step: int, *, evaluated: bool) -> None:
    """Drop the lines after `last_step`, and one that a kill or a crash damaged."""
    kept = path.with_name(path.name + ".tmp")
    try:
        with path.open("rb") as lines, kept.open("wb") as out:
            out.writelines(line for line in lines if _is_until(line, last_step, evaluated))
            out.flush()
            os.fsync(out.fileno())
        os.replace(kept, path)
    except OSError:
        kept.unlink(missing_ok=True)
        raise


def _is_until(line: bytes, last_step: int, evaluated: bool) -> bool:
    try:
        record = json.loads(line)
        again = record["step"] == last_step and not evaluated and "eval/accuracy" in record
        return line.endswith(b"\n") and record["step"] <= last_step and not again
    except (ValueError, TypeError, KeyError):  # no record of ours
        return False


def _strict(value: float | str | None) -> float | str | None:
    return value if not isinstance(value, float) or math.isfinite(value) else _number(value, "")


def _labelled(name: str, value: float | str | None) -> str:
    label = name.partition("/")[2]
    if not isinstance(value, float):
        return f"{label} {value}"
    return f"{label} {_number(value, '.2%' if label.endswith(('accuracy', 'top5')) else '.4f')}"


def _number(value: float, spec: str) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return format(value, spec)
