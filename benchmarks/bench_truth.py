"""Whether `dist-train bench` tells the truth: three measurements of `python -m benchmarks run`.

causes: late batches, a slow rank, a slow link: is each named as what to change first? predictions:
the model of scale against step times measured over a link with a delay, and on 4 and 8 ranks that
sleep instead of computing. compare: do two reports of the same code differ, and of slower code?
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.bench_faults import VARIABLE
from benchmarks.intervals import ROOT
from benchmarks.reliability.cable import ADDRESSES, DEVICE, Cable, why_no_cable
from dist_train.bench import launches, main
from dist_train.bench.advice import advice_for
from dist_train.bench.launches import FIXED, MEASURED, Setup
from dist_train.bench.results import results_of
from dist_train.bench.scale import predictions

WORKER = "benchmarks.bench_faults"
SMALL_STEP = (  # some 100 ms on one core
    "experiment=cifar10_tutorial",
    "data=synthetic",
    "device=cpu",
    "train.global_batch_size=96",
    "threads=1",
    "precision=fp32",  # as the fixed net that a machine's own speed is told by
)
SMALLER_STEP = (*SMALL_STEP, "train.global_batch_size=24")  # some 30 ms
SLEEPING = (
    *SMALL_STEP,
    "train.global_batch_size=16",
    "model.factory=benchmarks.bench_faults:sleeping_net",
    "model.args={size: 100000}",
)
CAUSES = {"data 0.005": "data", "slow 1.5": "waiting", "link 0.005": "all_reduce"}
DELAYS_SEC = (0.0, 0.001, 0.005)
COUNTS = (4, 8)
TRIES, SLOWER = 10, 0.05
SECONDS, LAUNCHES, LIMIT_SEC, STOP_SEC, PORT = 3.0, 3, 240.0, 60.0, 29500
SHOWN = 200  # characters of a failure, in the table
FAILURES = (RuntimeError, OSError, subprocess.SubprocessError)  # of one case


def causes() -> list[dict[str, Any]]:
    """Return for each fault what was named, or why that cannot be told, and the parts."""
    return [
        {"fault": fault} | attempted(partial(cause, fault, part)) for fault, part in CAUSES.items()
    ]


def cause(fault: str, part: str) -> dict[str, Any]:
    """Return what is named when one thing is wrong; `part` is what should be.

    Raises:
        RuntimeError, OSError, SubprocessError: it could not be measured.
    """
    word, amount = fault.split()
    if word == "link":
        result = over_a_link(SMALL_STEP, float(amount))
    else:
        result = here(SMALL_STEP, 2, fault)
    advice = advice_for(result)
    if advice is None:
        raise RuntimeError("the parts of the step were not measured")
    say(f"{fault}: {advice['part']}: {advice['text']}")
    told = {"wanted": part, "named": advice["part"], "text": advice["text"]}
    return told | {"parts_sec": result["parts_sec"]}


def scale() -> list[dict[str, Any]]:
    """Return predicted and measured step times over links with a delay, and on many ranks."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"2 ranks, {1000 * delay:g} ms of delay each way": partial(over_a_link, SMALL_STEP, delay)
        for delay in DELAYS_SEC
    }
    cases |= {f"{count} ranks that sleep": partial(here, SLEEPING, count) for count in COUNTS}
    return [{"case": name} | attempted(partial(checked, name, cases[name])) for name in cases]


def checked(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the model of scale's prediction for what `work` measures, and its error.

    Raises:
        RuntimeError, OSError, SubprocessError: it could not be measured.
    """
    told = predictions([work()])
    if told is None or not told["checked"]:
        raise RuntimeError("no prediction: the times of the all-reduce do not grow with its size")
    [check] = told["checked"]
    say(f"{name}: predicted {check['predicted_sec']:.5f} s, error {check['error']:+.1%}")
    return check


def attempted(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` finds, or why it could not."""
    try:
        return work()
    except FAILURES as failure:
        return {"not_run": why(failure)}


def why(failure: Exception) -> str:
    """Return a failure in words, with what a command said."""
    said = failure.stderr if isinstance(failure, subprocess.CalledProcessError) else None
    text = (
        f"{failure}: {said.decode(errors='replace')}" if isinstance(said, bytes) else f"{failure}"
    )
    say(text)
    return text.strip()


def compare() -> dict[str, Any]:
    """Return in how many tries a change was told, of the same code and of slower code."""
    os.environ["PYTHONPATH"] = str(ROOT)  # the launches run this repository's worker
    options = ["--nproc", "1", "--scaling", "strong"]  # as long as it takes by default
    with tempfile.TemporaryDirectory() as name, mock.patch.object(launches, "WORKER", WORKER):
        folder = Path(name)

        def report(number: str, *more: str) -> dict[str, Any]:
            file = folder / f"{number}.json"
            code = main.main([*options, "--json", str(file), *more, *SMALLER_STEP])
            if code != 0:
                raise RuntimeError(f"dist-train bench failed (exit code {code}) in {number}")
            return json.loads(file.read_text())

        same, slower, failed = [], [], {}
        try:
            report("0")
            for number in range(TRIES):
                before = ["--compare", str(folder / f"{number}.json")]
                now = report(str(number + 1), *before)
                sec = SLOWER * now["setups"][0]["step_sec"]["value"]
                before = ["--compare", str(folder / f"{number + 1}.json")]
                with mock.patch.dict(os.environ, {VARIABLE: f"sleep {sec}"}):
                    late = report(f"slower {number}", *before)
                same.append(now["compared"][0])
                slower.append(late["compared"][0])
                told = [f"{lines[-1]['change']:+.1%}" for lines in (same, slower)]
                say(f"try {number + 1}: the same code {told[0]}, slower code {told[1]}")
        except FAILURES as failure:
            failed = {"not_run": why(failure)}
    return failed | {
        "tries": len(same),
        "slower_by": SLOWER,
        "same": same,
        "slower": slower,
        "same_told": sum(line["changed"] for line in same),
        "slower_told": sum(line["changed"] and line["change"] > 0 for line in slower),
    }


def here(words: tuple[str, ...], count: int, fault: str | None = None) -> dict[str, Any]:
    """Return the result of `count` ranks on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", WORKER]
    return _result(words, count, [command], {VARIABLE: fault} if fault else {})


def over_a_link(words: tuple[str, ...], delay_sec: float) -> dict[str, Any]:
    """Return the result of two ranks whose packets take `delay_sec` each way.

    Raises:
        RuntimeError, OSError, SubprocessError: no link can be laid here, or a launch failed.
    """
    reason = why_no_cable()
    if reason is not None:
        raise RuntimeError(reason)
    with Cable(seed=0) as cable:
        cable.delay_sec = delay_sec
        commands = [
            [
                *cable.command(end),
                *[sys.executable, "-m", "torch.distributed.run", "--nnodes=2"],
                *["--nproc-per-node=1", "--rdzv-backend=c10d", f"--local-addr={address}"],
                *[f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--rdzv-conf=is_host={1 - end}"],
                *["-m", WORKER],
            ]
            for end, address in enumerate(ADDRESSES)
        ]
        return _result(words, 2, commands, {"GLOO_SOCKET_IFNAME": DEVICE})


def _result(
    words: tuple[str, ...], count: int, commands: list[list[str]], environment: dict[str, str]
) -> dict[str, Any]:
    """Launch all commands, the parts of one run, some times; return the result of all launches."""
    with tempfile.TemporaryDirectory() as name:
        measured = [
            _launch(words, commands, environment, Path(name) / str(number), number)
            for number in range(LAUNCHES)
        ]
    size = measured[0]["ranks"][0]["global_batch_size"]
    setup = Setup(num_ranks=count, num_nodes=0, global_batch_size=size, scalings=("strong",))
    [result] = results_of([(setup, measured)])
    return result


def _launch(
    words: tuple[str, ...],
    commands: list[list[str]],
    environment: dict[str, str],
    folder: Path,
    number: int,
) -> dict[str, Any]:
    folder.mkdir()
    spec = {"folder": str(folder), "seconds": SECONDS, "number": number, "begun": time.time()}
    rest = ["--spec", json.dumps(spec), *words, *FIXED, f"run_dir={folder}/run"]
    env = os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with _started([[*command, *rest] for command in commands], env, folder) as processes:
        for process in processes:
            try:
                code = process.wait(timeout=LIMIT_SEC)
            except subprocess.TimeoutExpired:
                code = None
            if code != 0:
                ended = "did not come to an end" if code is None else f"failed (exit code {code})"
                texts = [path.read_text(errors="replace") for path in sorted(folder.glob("*.txt"))]
                said = "\n".join(text[-2000:] for text in texts)
                raise RuntimeError(f"a launch {ended}; the ranks said last:\n{said}")
    return json.loads((folder / MEASURED).read_text())


@contextlib.contextmanager
def _started(
    commands: list[list[str]], env: dict[str, str], folder: Path
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    processes = []
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            file = stack.enter_context((folder / f"{number}.txt").open("wb"))
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file))
        try:
            yield processes
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(timeout=STOP_SEC)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def say(text: str) -> None:
    """Say how it goes."""
    sys.stderr.write(text + "\n")


def causes_table(found: list[dict[str, Any]]) -> str:
    """Return what was named as Markdown."""
    lines = ["| what is wrong, on 2 ranks | named first | in words |", "|---|---|---|"]
    for told in found:
        if "not_run" in told:
            lines.append(f"| {told['fault']} | not run: {_in_a_cell(told['not_run'])} | |")
        else:
            mark = "" if told["named"] == told["wanted"] else f" (**wanted {told['wanted']}**)"
            text = told["text"].replace("\u00b1", "+-")
            lines.append(f"| {told['fault']} | {told['named']}{mark} | {text} |")
    return "\n".join(lines)


def scale_table(found: list[dict[str, Any]]) -> str:
    """Return predictions and what was measured as Markdown."""
    lines = ["| case | step predicted, ms | measured, ms | error |", "|---|---|---|---|"]
    for check in found:
        if "not_run" in check:
            lines.append(f"| {check['case']} | not run: {_in_a_cell(check['not_run'])} | | |")
        else:
            times = [f"{1000 * check[key]:.2f}" for key in ("predicted_sec", "measured_sec")]
            lines.append(f"| {check['case']} | {' | '.join(times)} | {check['error']:+.1%} |")
    return "\n".join(lines)


def compare_table(both: dict[str, Any]) -> str:
    """Return in words how often a change was told."""
    text = (
        f"`--compare` of two reports of the same code told a change in {both['same_told']} of "
        f"{both['tries']} tries; of code whose steps sleep {both['slower_by']:.0%} longer in "
        f"{both['slower_told']} of {both['tries']}."
    )
    if "not_run" in both:
        text += f" No more tries: {_in_a_cell(both['not_run'])}."
    return text


def _in_a_cell(text: str) -> str:
    """Return the end of a text in one line that a table of Markdown can hold."""
    line = " ".join(text.split()).replace("|", "/").encode("ascii", "replace").decode()
    return line if len(line) <= SHOWN else f"... {line[-SHOWN:]}"
