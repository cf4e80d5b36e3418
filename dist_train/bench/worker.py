"""One rank of one launch of the benchmark: `torchrun ... -m dist_train.bench.worker --spec SPEC`.

Rank 0 writes what all ranks measured into the folder that the specification names.
"""

import contextlib
import itertools
import json
import os
import random
import resource
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_train.bench.launches import FAILURE, MEASURED, REFUSAL
from dist_train.bench.machine_speed import (
    Reference,
    product_rate,
)
from dist_train.bench.once import measure_once
from dist_train.bench.steady import warm_up_length
from dist_train.bench.ways import Steps
from dist_train.claim import open_run
from dist_train.config import Config, ConfigError
from dist_train.config.arguments import Parser, add_run_options, compose_request
from dist_train.config.whole_file import write_atomically
from dist_train.data.loaders import open_data
from dist_train.distributed import RankFailedError, Ranks, shorten_timeouts, start_ranks
from dist_train.plan import make_plan
from dist_train.start import (
    build_parts,
    find_micro_batch_size,
    start_left_out_of_collections,
)
from dist_train.trial import throw_away_step
from dist_train.watchdog import watch

BLOCK_SEC = 0.15  # short: the machine's speed is much the same for all blocks of a round
MOST_STEPS = 200  # of a block
PIECES = 3  # of a full block, with the reference beside each
LEAD = 1  # steps before each block, which bring ranks in step with each other and fill the caches
WARM_LEAST_SEC, WARM_MOST_SEC = 1.5, 60.0
LEAST_ROUNDS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What a launch is to do; written by dist_train.bench.launches."""

    folder: str  # for the files that dist_train.bench.launches names
    seconds: float  # of measuring, after the warm-up
    number: int  # of the launch among those of its setup: seed of the order of the ways
    begun: float  # time.time() when the launch was begun


def main() -> None:
    """Measure; what goes wrong is the launcher's to tell, from a file.

    Raises:
        SystemExit: with 2, the configuration is refused.
    """
    parser = Parser(prog="dist_train.bench.worker")
    parser.add_argument("--spec", required=True)
    add_run_options(parser)
    options = parser.parse_intermixed_args(sys.argv[1:])
    spec = Spec(**json.loads(options.spec))
    folder = Path(spec.folder)
    try:
        found = measure(compose_request(options).config, spec)
    except ConfigError as mistake:
        write_atomically(folder / REFUSAL, str(mistake))
        raise SystemExit(2) from None
    except Exception as error:
        _tell_first(folder / FAILURE, error)
        raise
    if found is not None:
        (folder / MEASURED).write_text(json.dumps(found))


def _tell_first(path: Path, error: Exception) -> None:
    """Write the traceback, unless another rank did: what follows there is a consequence."""
    if isinstance(error, RankFailedError):
        return
    lines = [f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}:\n"]
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write("".join(lines + traceback.format_exception(error)))


def leave() -> None:
    """End at once: torch takes a second to take itself apart, of every launch."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def measure(config: Config, spec: Spec) -> dict[str, Any] | None:
    """Return what all ranks measured, on rank 0. Collective."""
    with start_ranks(config) as ranks, open_run(config, ranks) as run:
        with watch(config, ranks, run.path, run.warn):
            data = open_data(config, ranks)
            plan = make_plan(config, data.num_train, world_size=ranks.world_size)
            parts = build_parts(config, plan, data, run)
            find_micro_batch_size(parts, data, run)
            throw_away_step(parts, data, step=0)
            shorten_timeouts(ranks, config.parallel.step_timeout_sec)
            steps = Steps(parts, data)
            first_sec = sum(steps.block("full", 1))
            ready_sec = time.time() - spec.begun
            with start_left_out_of_collections():
                mine: dict[str, Any] = {
                    "rank": ranks.rank,
                    "host": socket.gethostname(),
                    "first_step_sec": first_sec,
                    "start_to_first_step_sec": ready_sec,
                }
                mine |= _warm_up(steps, ranks)
                mine["memory_bytes"] = _peak_memory(ranks.device)  # before this file takes its own
                mine |= _rounds(steps, ranks, mine["step_sec"], spec, parts.precision)
                mine |= measure_once(steps, parts, ranks, count_flops=spec.number == 0)
                mine |= {"dataset": data.name, "notice": data.notice}
        parts.replica.close()
        everyone = ranks.gather(mine)
    return {"ranks": everyone} if ranks.rank == 0 else None


def _warm_up(steps: Steps, ranks: Ranks) -> dict[str, Any]:
    """Take steps until their times are steady on all ranks. Collective."""
    times: list[float] = []
    begun = time.monotonic()
    while True:
        times += steps.block("full", _block_length(times, ranks))
        spent = time.monotonic() - begun
        length = warm_up_length(times)
        moving = length is None or spent < WARM_LEAST_SEC
        if not ranks.any(moving) or ranks.any(spent > WARM_MOST_SEC):
            break
    rest = sorted(times[length or 0 :])
    return {
        "warm_up_steps": length if length is not None else len(times),
        "warm_up_sec": spent,
        "steady": length is not None,
        "step_sec": rest[len(rest) // 2],
    }


def _block_length(times: list[float], ranks: Ranks) -> int:
    """Return how many steps a block has: the same on all ranks. Collective."""
    if not times:
        return 2
    recent = sorted(times[-50:])
    wish = int(BLOCK_SEC / max(1e-6, recent[len(recent) // 2]))
    return max(2, min(MOST_STEPS, min(ranks.gather(wish))))


def _rounds(
    steps: Steps, ranks: Ranks, step_sec: float, spec: Spec, precision: str
) -> dict[str, Any]:
    """Take blocks of all ways in turns. Collective."""
    length = _block_length([step_sec], ranks)
    blocks: dict[str, list[list[float]]] = {way: [] for way in steps.ways}
    phases: list[list[list[float]]] = []
    waits: list[list[float]] = []
    alone_cpu_sec, alone_core_delay_sec = [], []
    references: list[list[float]] = []
    products = []
    reference, dice = Reference(ranks.device), random.Random(spec.number)
    pieces = pieces_of_block(length, workers=steps.loader == "workers")
    length -= length % pieces
    end = time.monotonic() + spec.seconds
    for number in range(1_000_000):
        late = time.monotonic() > end and number >= LEAST_ROUNDS
        if ranks.any(late):
            break
        products.append(product_rate(ranks.device, precision))
        for way in dice.sample(steps.ways, len(steps.ways)):
            if way == "full":
                times, waited, beside = _full_block(steps, reference, length, pieces)
                blocks[way].append(times)
                waits.append(waited)
                references.append(beside)
                continue
            blocks[way].append(steps.block(way, length, lead=LEAD))
            if way == "alone":
                alone_cpu_sec.append(steps.cpu_sec)
                alone_core_delay_sec.append(steps.core_delay_sec)
            if way == "bare":
                phases.append(steps.phases)
    return {
        "blocks": blocks,
        "phases": phases,
        "waits": waits,
        "alone_cpu_sec": alone_cpu_sec,
        "alone_core_delay_sec": alone_core_delay_sec,
        "reference_sec": references,
        "product_flops_per_sec": products,
        "block_steps": length,
    }


def pieces_of_block(length: int, *, workers: bool) -> int:
    """Return in how many pieces a full block of `length` steps is taken.

    The machine's speed may change within a block, and the closer the reference is the better. But
    each piece is longer than the LEAD of steps before it that are not measured, and where
    `workers` load batches they would load them meanwhile: one piece.
    """
    return 1 if workers else max(1, min(PIECES, length // (1 + LEAD)))


def _full_block(
    steps: Steps, reference: Reference, length: int, pieces: int
) -> tuple[list[float], list[float], list[float]]:
    """Take a full block; returns its steps, their waits, and the reference beside each piece."""
    times, waits = [], []
    steps.drain(length)
    marks = [reference.seconds()]
    for _ in range(pieces):
        times += steps.block("full", length // pieces, lead=LEAD)
        waits += steps.waits
        marks.append(reference.seconds())
    return times, waits, [(before + after) / 2 for before, after in itertools.pairwise(marks)]


def _peak_memory(device: torch.device) -> float:
    """Return the most bytes so far: of the GPU's tensors, on a CPU of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
    leave()
