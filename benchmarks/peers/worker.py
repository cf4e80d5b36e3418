"""One process of one peer, by itself or under torchrun: `python -m benchmarks.peers.worker`."""

import argparse
import json
import os
import socket
from pathlib import Path

import torch

from benchmarks.peers.job import CASES, Job, measured

PEERS = {
    "plain": "loops",
    "fast": "loops",
    "fabric": "frameworks",
    "ignite": "frameworks",
    "lightning": "frameworks",
    "accelerate": "frameworks",
    "hf_trainer": "frameworks",
    "ours": "ours",
}
TURNS = "turns"  # the socket in a peer's folder
GO = b"."  # the turn is this process's; sent back when the process ends it


class _Turns:
    """This process's side: it says that it waits, and goes on when it is told to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def __call__(self) -> None:
        """Wait for the turn; raises ConnectionError if nobody hands out turns any more."""
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(self._path))
        self._socket.sendall(GO)
        if self._socket.recv(1) != GO:
            raise ConnectionError(f"{self._path}: nobody hands out turns any more")


def main() -> None:
    """Train and leave what was measured in FOLDER/rank<n>.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--style", choices=("lean", "default"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--begun", type=float, required=True, help="when the command was given")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    job = Job(
        case=CASES[asked.case],
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        precision=asked.precision,
        lean=asked.style == "lean",
        folder=asked.folder,
        wait_for_turn=_Turns(asked.folder / TURNS),
    )
    module = __import__(f"benchmarks.peers.{PEERS[asked.peer]}", fromlist=[asked.peer])
    weights = getattr(module, asked.peer)(job)
    result = measured(job, weights, asked.begun)
    (asked.folder / f"rank{job.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
