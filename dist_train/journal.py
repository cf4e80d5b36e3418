"""Files of lines that outlive a full disk: what cannot be written is kept and written later."""

import json
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

MAX_WAITING_BYTES = 64 << 20


class LineFile:
    """Appends whole lines to a file, from any thread.

    An error of the disk is never raised: the line waits in memory, with all after it, and
    `take_news` says so once. A line is written whole or not at all. What waits longer than
    `MAX_WAITING_BYTES` of newer lines is dropped, and counted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._file: int | None = None
        self._lock = threading.Lock()
        self._error: OSError | None = None
        self._news: list[str] = []

    def append(self, text: str) -> None:
        """Write a line, or keep it until the disk takes lines again."""
        line = text.encode() + b"\n"
        with self._lock:
            self._waiting.append(line)
            self._waiting_bytes += len(line)
            while self._waiting_bytes > MAX_WAITING_BYTES:
                self._waiting_bytes -= len(self._waiting.popleft())
                self._dropped += 1
            self._flush()

    def append_record(self, record: dict[str, Any]) -> None:
        """Write one JSON object a line."""
        self.append(json.dumps(record))

    def take_news(self) -> list[str]:
        """Try again to write what waits; return what has happened since the last call."""
        with self._lock:
            if self._waiting:
                self._flush()
            news, self._news = self._news, []
        return news

    def close(self) -> str | None:
        """Write what waits and close the file; returns what was lost, if anything."""
        with self._lock:
            self._flush()
            self._shut()
            if self._error is None:
                return None
            lost = len(self._waiting) + self._dropped
            how_many = f"{lost} lines" if lost else "the last lines"
            return f"{how_many} of {self.path} are lost: {self._error}"

    def _flush(self) -> None:
        """Write what waits. The lock is held."""
        before = len(self._waiting)
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            known = self._error
            self._shut()
            if known is None or known.errno != error.errno:
                self._news.append(
                    f"cannot write to {self.path}: {error.strerror or error}; training goes on, "
                    "its lines wait in memory and are lost if this process ends before"
                )
            self._error = error
            return
        if self._error is not None:
            lost = f", {self._dropped} are lost" if self._dropped else ""
            self._news.append(f"{self.path} is written again: {before} lines had waited{lost}")
            self._error, self._dropped = None, 0

    def _write(self, line: bytes) -> None:
        if self._file is not None and os.fstat(self._file).st_nlink == 0:
            self._shut()  # deleted by someone: a new file is better than none
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o644)
        start = os.fstat(self._file).st_size
        rest = memoryview(line)
        try:
            while rest:  # a full disk can cut a write short: the next one raises
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            if len(rest) < len(line):
                os.ftruncate(self._file, start)  # no torn line
            raise

    def _shut(self) -> None:
        file, self._file = self._file, None  # closed or not, its number may be another file's now
        if file is None:
            return
        try:
            os.close(file)
        except OSError as error:  # a network file system may tell only now
            self._error = self._error or error
