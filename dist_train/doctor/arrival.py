"""How a rank arrives: it imports torch and finds rank 0's store, or can say why not."""

import os
import time
from collections.abc import Mapping

from dist_train.doctor.board import Board
from dist_train.doctor.deadline import within
from dist_train.doctor.meeting import (
    Arrival,
    Probe,
    address_toward,
    is_taken,
    own_addresses,
    probe,
)
from dist_train.layout import Layout, port_of

RETRY_SEC = 0.2
STEPS_AHEAD = 3  # later steps of this job whose port is looked at


def arrive(layout: Layout, board: Board, port: int, wait_sec: float) -> Arrival:
    """Import torch, join rank 0's store, and say what came of it.

    Args:
        layout: this rank's place.
        board: gets the store, if it can be reached.
        port: where this rank listens to its peers.
        wait_sec: how long rank 0 may take to come.
    """
    began, error = time.monotonic(), ""
    versions, gpus, model = {}, [], ""
    try:
        versions, gpus, model = within(wait_sec, lambda: _import_torch(layout))
    except Exception as failure:  # whatever is wrong with an installation
        error = f"{type(failure).__name__}: {failure}"[:200]
    import_sec = time.monotonic() - began
    if error:
        found = Probe(outcome="unreachable", detail="without torch")
    elif layout.launcher == "single":
        found = Probe(outcome="reached")
    elif layout.rank == 0 and not layout.store_is_served:
        found = _serve(layout, board)
    else:
        found = _join(layout, board, wait_sec)
    return Arrival(
        rank=layout.rank,
        import_sec=import_sec,
        torch_error=error,
        **versions,
        gpus=gpus,
        gpu_model=model,
        store=found.outcome,
        store_detail=found.detail,
        store_address=found.address,
        port=port,
        own_addresses=own_addresses(),
        address=address_toward(layout.master_addr),
        taken_ports=[p for p in next_ports(layout, os.environ) if is_taken(p)],
    )


def _import_torch(layout: Layout) -> tuple[dict[str, str], list[str], str]:
    from dist_train.doctor import torch_side

    torch_side.use_threads(layout)
    return torch_side.versions(), *torch_side.gpus()


def _serve(layout: Layout, board: Board) -> Probe:
    from dist_train.doctor import torch_side

    try:
        store = torch_side.serve_store(layout)
    except RuntimeError as error:
        taken = "EADDRINUSE" in str(error) or "already in use" in str(error)
        why = "it is taken by another process" if taken else " ".join(str(error).split())[:200]
        board.post("serving", {"error": why})
        return Probe(outcome="taken", detail=why)
    board.store = store
    board.post("serving", {"error": ""})
    return Probe(outcome="reached")


def _join(layout: Layout, board: Board, wait_sec: float) -> Probe:
    """Try until rank 0 is there; what fails once it says that it listens has failed."""
    from dist_train.doctor import torch_side

    end = time.monotonic() + wait_sec
    while True:
        serving = None if layout.store_is_served else board.wait("serving", 0, 0)
        if serving is not None and serving["error"]:
            return Probe(outcome="not tried", detail=serving["error"])
        found, connection = probe(layout.master_addr, layout.master_port)
        if connection is not None:
            connection.close()
            try:
                board.store = torch_side.join_store(layout)
                return found
            except RuntimeError as error:
                text = f"what listens there is no store of rank 0's: {error}"
                found = Probe(outcome="another answers", detail=text[:200], address=found.address)
        if serving is not None or time.monotonic() >= end:
            return found
        time.sleep(RETRY_SEC)


def next_ports(layout: Layout, env: Mapping[str, str]) -> list[int]:
    """Return the ports that the next steps of this SLURM job would take; on rank 0 alone."""
    job, step = env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID", "")
    if layout.launcher != "slurm" or layout.rank != 0 or not step.isdigit():
        return []
    later = range(int(step) + 1, int(step) + 1 + STEPS_AHEAD)
    return [port_of(f"{job}.{number}.{layout.attempt}") for number in later]
