"""Standard output and error as they come: closed, a script's own Tee, or for ASCII letters only."""

import os
import sys
from typing import Any


def put(stream: Any, text: str) -> None:
    """Write text and flush; letters that the stream's encoding lacks are escaped.

    Args:
        stream: whatever sys.stdout or sys.stderr is: None (closed) takes everything.
        text: what to write.

    Raises:
        OSError: the disk is full, nobody reads.
        ValueError: the stream was closed.
    """
    if stream is None:
        return
    try:
        stream.write(text)
    except UnicodeEncodeError as error:
        stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    flush = getattr(stream, "flush", None)
    if flush is not None:
        flush()


def is_terminal(stream: Any) -> bool:
    """Say whether a person looks at a stream; one that cannot tell is none."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def open_standard_streams() -> None:
    """Open what of standard input, output and error is closed: on /dev/null. For a whole process.

    Else the next file that is opened takes the free number, a checkpoint perhaps, and what a
    library prints goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115 # stays
        elif number > 0 and getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")
