"""`dist-train checkpoint ls|verify|show PATH`: what is saved, and whether it is whole.

Exit code 0: good; 1: something is bad; 2: the user's mistake. Imports no torch, changes nothing.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.checkpoint_folder import (
    BadCheckpointError,
    list_checkpoints,
    newest_good,
    open_to_others,
    read_manifest,
    read_verified,
    step_of,
)
from dist_train.config import ConfigError
from dist_train.config.arguments import Parser, print_error
from dist_train.state_file import TensorOutline, outline

VERBS = {
    "ls": "list the checkpoints; reads their manifests only",
    "verify": "read every byte and compare the checksums; runs no code",
    "show": "list what is inside the newest good one, or the one given",
}


def main(argv: list[str]) -> int:
    """Run `dist-train checkpoint`; returns the exit code."""
    parser = Parser(
        prog="dist-train checkpoint",
        description="Look at checkpoints.",
        epilog="\n".join(f"  {verb:<8} {what}" for verb, what in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="ls|verify|show")
    parser.add_argument("path", type=Path, help="a run's folder, its checkpoints/, or a checkpoint")
    try:
        options = parser.parse_args(argv)
        paths = find(options.path)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    if options.verb == "show":
        return _show(options.path, paths)
    return _table(paths, whole=options.verb == "verify")


def find(path: Path) -> list[Path]:
    """Return the checkpoints that `path` means, newest first; always at least one.

    Raises:
        ConfigError: there is none.
    """
    if re.fullmatch(r"step_[0-9]+", path.absolute().name) and (path.is_dir() or path.is_symlink()):
        return [path]
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder: give a run's folder or one of its checkpoints")
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise ConfigError(
            f"{path} holds no checkpoints (step_00001000/ and so on): give a run's folder, its "
            "checkpoints/, or one checkpoint"
        )
    return found


def _table(paths: Sequence[Path], *, whole: bool) -> int:
    rows, warnings, num_bad = [("checkpoint", "step", "MiB", "saved", "state")], [], 0
    for path in paths:
        warnings += [text for text in open_to_others(path) if text not in warnings]
        step, size, saved = str(step_of(path)), "", ""
        try:
            manifest = read_manifest(path)
            size, saved = f"{manifest.state_bytes / 2**20:.1f}", manifest.saved_at[:40]
            state = "manifest good"
            if whole:
                outline(read_verified(path))
                state = "good"
            elif (path / "state.pt").lstat().st_size != manifest.state_bytes:
                raise BadCheckpointError(f"{path / 'state.pt'} has another size than it should")
        except (BadCheckpointError, OSError) as bad:
            num_bad += 1
            state = f"BAD: {bad}"
        rows.append((path.absolute().name, step, size, saved, state))
    _write(_columns(rows))
    _write(f"warning: {text}" for text in warnings)
    kind = "verified" if whole else "listed; `verify` reads every byte"
    _write([f"{len(paths)} {kind}, {num_bad} bad"])
    return 1 if num_bad else 0


def _show(asked: Path, paths: Sequence[Path]) -> int:
    try:
        if paths == [asked]:
            path, data = asked, read_verified(asked)
        else:
            found = newest_good(paths[0].parent, lambda text: _write([f"*** {text} ***"]))
            assert found is not None, "find() found some"
            path, data = found
        state = outline(data)
        state.pop("model_metadata", None)  # a version number for each module
        manifest = read_manifest(path)
    except BadCheckpointError as bad:
        print_error(str(bad))
        return 1
    _write([f"{path}", f"step {manifest.step}, saved {manifest.saved_at}, checksums good", ""])
    rows = list(_flat(state))
    tensors = [(name, value) for name, value in rows if isinstance(value, TensorOutline)]
    plain = [(f"  {name}", _short(value)) for name, value in rows if (name, value) not in tensors]
    _write(["values", *_columns(plain), "", "tensors"])
    shapes = [(n, t.dtype, "x".join(map(str, t.shape)) or "scalar") for n, t in tensors]
    _write(_columns([(f"  {name}", dtype, shape) for name, dtype, shape in shapes]))
    total = sum(tensor.bytes for _, tensor in tensors)
    _write([f"  {len(tensors)} tensors, {total / 2**20:.1f} MiB"])
    settings = path.absolute().parent.parent / "config.yaml"
    if settings.is_file():
        _write(["", f"settings ({settings})"])
        _write(f"  {line}" for line in settings.read_text(encoding="utf-8").splitlines())
    return 0


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything that holds nothing else, or nothing at all."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(
        isinstance(v, dict | TensorOutline) for v in value
    ):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}.{number}")
    else:
        yield name, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]} ... ({len(text)} characters)"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _write(lines: Iterator[str] | Sequence[str]) -> None:
    for line in lines:  # what a file says of itself must not steer the terminal
        sys.stdout.write("".join(c if c.isprintable() else "?" for c in line) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
