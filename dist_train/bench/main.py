"""`dist-train bench`: how fast an experiment trains on 1, 2, 4 ... ranks, and where the rest goes.

    dist-train bench --nproc 1,2,4,8 experiment=cifar10_resnet9      this machine
    salloc --nodes=4 ... dist-train bench --nodes 1,2,4 ...          in an allocation of SLURM

Exit code: 0 measured, 1 a launch failed or a file was not written, 2 the user's mistake; 128 and
the number of a signal that ended it.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dist_train.bench import compare
from dist_train.bench.advice import advice_for
from dist_train.bench.launches import LaunchFailedError, Scaling, Setup, launch, setups_of
from dist_train.bench.page import check_matplotlib, write_page
from dist_train.bench.report import as_text
from dist_train.bench.results import SCHEMA, results_of
from dist_train.bench.scale import predictions
from dist_train.config import Config, ConfigError
from dist_train.config.arguments import Parser, add_run_options, compose_request, print_error
from dist_train.config.check import check_world
from dist_train.config.redact import redact, redact_words
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.preemption import not_ignored
from dist_train.run_folder import cpu_name

SECONDS = 6.0
LEAST_REPEATS, MOST_REPEATS = 4, 8  # launches of each setup: as many as fit into
TOGETHER_SEC = 285.0
MOST_CPU_RANKS = 2
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(argv: list[str]) -> int:
    """Run `dist-train bench`; returns the exit code."""
    try:
        options = _parse(argv)
        request = compose_request(options)
        config = request.config
        if request.text is not None:
            sys.stdout.write(request.text + "\n")
            return 0
        counts = _counts(options)
        scalings: tuple[Scaling, ...] = (
            ("strong", "weak") if options.scaling == "both" else (options.scaling,)
        )
        if len(counts) == 1:
            scalings = scalings[:1]  # both are the same then
        for ranks, _ in counts:
            check_world(config, ranks)
        setups = setups_of(counts, config.train.global_batch_size, scalings)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    if request.dry_run:
        sys.stdout.write(_planned(setups, options))
        return 0
    old = None if options.compare is None else read_json(options.compare)
    try:
        with _ended_by_signals():
            measured = _measure(setups, options, config)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    except LaunchFailedError as failure:
        first, *more = redact(str(failure)).splitlines()
        print_error(first)
        sys.stderr.write("\n".join(more) + "\n")
        return 1
    report = _report(measured, options, config.experiment, argv)
    sys.stdout.write(as_text(report))
    if old is not None:
        lines = compare.compare(old, report)
        report["compared"] = lines
        sys.stdout.write(compare.as_text(lines, old, report))
    return _write(report, options)


def _write(report: dict[str, Any], options: argparse.Namespace) -> int:
    """Write the files that were asked for; returns 1 if one could not be."""
    code = 0
    for path, write in ((options.json, _write_json), (options.page, write_page)):
        if path is None:
            continue
        try:
            for written in write(report, path):
                sys.stdout.write(f"written: {written}\n")
        except OSError as error:  # that it could be was asked before all was measured
            print_error(f"{path} could not be written: {error.strerror}")
            code = 1
    return code


def _write_json(report: dict[str, Any], path: Path) -> list[Path]:
    write_atomically(path, json.dumps(report, indent=1))
    return [path]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="dist-train bench",
        description="Measure an experiment on several numbers of ranks, and where its time goes.",
    )
    parser.add_argument("--nproc", help="ranks on this machine: 1,2,4 (with --nodes: on each)")
    parser.add_argument("--nodes", help="nodes of this allocation of SLURM: 1,2,4")
    parser.add_argument("--scaling", choices=("strong", "weak", "both"), default="both")
    parser.add_argument(
        "--repeats",
        type=int,
        help="launches of each, in turns; default: as many as fit into five minutes, from "
        f"{LEAST_REPEATS} to {MOST_REPEATS}",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of measuring in each launch, once steady"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument(
        "--page", type=Path, help="write a page with curves to FILE.html, and FILE.png"
    )
    parser.add_argument("--compare", type=Path, help="a file of --json: what changed since then")
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="where to put the temporary run folders; with --nodes all must see it (runs)",
    )
    add_run_options(parser)
    options = parser.parse_intermixed_args(argv)
    if options.repeats is not None and options.repeats < 2:
        raise ConfigError(f"--repeats={options.repeats} must be 2 or more, to know the spread")
    if not 0.5 <= options.seconds <= 600:
        raise ConfigError(f"--seconds={options.seconds} must be from 0.5 to 600")
    for option, path in (("--json", options.json), ("--page", options.page)):
        if path is not None:
            _check_place(option, path)
    if options.page is not None:
        check_matplotlib()
        if options.page.suffix != ".html":
            raise ConfigError(f"--page={options.page} must end with .html")
    if options.compare is not None:
        _check_report(options.compare)
    if options.work_dir is None and options.nodes is not None:
        options.work_dir = Path("runs")
    return options


def _check_place(option: str, path: Path) -> None:
    """Raise ConfigError if no file can be put there."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}={path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{option}={path} is a folder: name a file in it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{option}={path}: {path.parent}: {error.strerror}") from error


def _check_report(path: Path) -> None:
    """Raise ConfigError if the file is no report that can be compared with."""
    old: Any = read_json(path)  # whatever the file holds
    schema = old.get("schema") if isinstance(old, dict) else None
    if schema == SCHEMA:
        try:
            compare.as_text(compare.compare(old, old), old, old)
            return
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            what = "no whole report"
    elif not path.exists():
        what = "not there"
    else:
        what = "no report of this benchmark" if schema is None else f"of schema {schema!r}"
    raise ConfigError(
        f"--compare={path} is {what}: give a file that --json wrote, of schema {SCHEMA!r}"
    )


def _counts(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the (ranks, nodes) to measure, ascending; 0 nodes: this machine, without SLURM."""
    if options.nodes is not None:
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError(
                "--nodes needs an allocation of SLURM: salloc --nodes=4 ... dist-train bench "
                "--nodes 1,2,4 ..."
            )
        each = _numbers(options.nproc or "1", "--nproc")
        if len(each) > 1:
            raise ConfigError(f"--nproc={options.nproc}: with --nodes it is one number, of each")
        return [(each[0] * nodes, nodes) for nodes in _numbers(options.nodes, "--nodes")]
    if options.nproc is not None:
        return [(count, 0) for count in _numbers(options.nproc, "--nproc")]
    most = torch.cuda.device_count() or min(MOST_CPU_RANKS, len(os.sched_getaffinity(0)))
    powers = [2**k for k in range(most.bit_length()) if 2**k <= most]
    return [(count, 0) for count in sorted({*powers, most})]


def _numbers(text: str, option: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{option}={text} must be numbers from 1 on, with commas: 1,2,4")
    return sorted({int(word) for word in words})


def _planned(setups: list[Setup], options: argparse.Namespace) -> str:
    """Return in words what would be measured."""
    some = f"from {LEAST_REPEATS} to {MOST_REPEATS}" if options.repeats is None else options.repeats
    lines = [f"{some} launches of each, in turns, each with {options.seconds:g} s of measuring:"]
    for setup in setups:
        nodes = f" on {setup.num_nodes} nodes" if setup.num_nodes else ""
        ranks = f"{setup.num_ranks} rank{'s' * (setup.num_ranks > 1)}{nodes}"
        batch = f"train.global_batch_size={setup.global_batch_size}"
        lines.append(f"  {ranks}, {batch}: {' and '.join(setup.scalings)} scaling")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a signal end the launch that runs and remove its folder."""

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in not_ignored(ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _measure(
    setups: list[Setup], options: argparse.Namespace, config: Config
) -> list[tuple[Setup, list[dict[str, Any]]]]:
    """Launch every setup once in each round, in as many as `rounds_in` says; say how it goes."""
    most = max(setup.num_ranks // max(1, setup.num_nodes) for setup in setups)
    threads = max(1, len(os.sched_getaffinity(0)) // most)
    measured: list[tuple[Setup, list[dict[str, Any]]]] = [(setup, []) for setup in setups]
    begun, done, rounds = time.monotonic(), 0, 1
    sys.stderr.write(_planned(setups, options))
    while done < rounds * len(setups):
        number = done // len(setups)
        turn = measured if number % 2 == 0 else measured[::-1]
        for setup, launches in turn:
            launches.append(launch(setup, options, config, threads=threads, number=number))
            done += 1
            mean_sec = (time.monotonic() - begun) / done
            rounds = rounds_in(TOGETHER_SEC, mean_sec * len(setups), options.repeats)
            left = max(0, rounds * len(setups) - done)
            sys.stderr.write(
                f"launch {done} of {done + left}: {setup.num_ranks} x "
                f"{launches[-1]['ranks'][0]['batch_size']}, {left * mean_sec:.0f} s to go\n"
            )
    return measured


def rounds_in(sec: float, round_sec: float, wanted: int | None) -> int:
    """Return how many rounds to take: those wanted, or as many as fit into `sec` seconds."""
    if wanted is not None:
        return wanted
    return max(LEAST_REPEATS, min(MOST_REPEATS, int(sec / round_sec)))


def _report(
    measured: list[tuple[Setup, list[dict[str, Any]]]],
    options: argparse.Namespace,
    experiment: str,
    argv: list[str],
) -> dict[str, Any]:
    setups = results_of(measured)
    largest = setups[-1] if len(setups) == 1 else max(setups, key=lambda r: r["num_ranks"])
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["dist-train", "bench", *redact_words(argv)]),
        "experiment": experiment,
        "repeats": len(measured[0][1]),
        "seconds": options.seconds,
        "machine": {
            "host": platform.node(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "device": setups[0]["device"],
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "setups": setups,
        "advice": advice_for(largest),
        "scale": predictions(setups),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
