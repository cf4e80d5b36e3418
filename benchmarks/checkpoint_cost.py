"""What a checkpoint costs: `python benchmarks/checkpoint_cost.py [FOLDER]`, as one JSON object.

ResNet-18 with SGD's momentum (90 MB). In turns: a save that training waits for to its end, and one
that only copies the state and leaves the rest to the thread; then reading and verifying.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import name_of, read_verified
from dist_train.checkpoint_writer import CheckpointWriter
from dist_train.models.resnet18 import resnet18_cifar

TRIALS = 15


def state_of(device: str) -> dict[str, object]:
    """Return the state of a ResNet-18 that SGD with momentum has taken a step with."""
    model = resnet18_cifar(num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(2, 3, 32, 32, device=device)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    """Return median, least and most, in ms."""
    in_ms = [round(1000 * t, 2) for t in times]
    return {"median_ms": statistics.median(in_ms), "least_ms": min(in_ms), "most_ms": max(in_ms)}


def main() -> int:
    """Measure and print; returns the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, data = state_of(device), b""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
        folder = Path(name) / "checkpoints"
        writer = CheckpointWriter(
            folder, keep_last=2, on_saved=lambda step: None, on_error=lambda text: sys.exit(text)
        )
        whole, stall, thread, reading, loading = [], [], [], [], []

        def save(step: int) -> None:
            writer.save(state, step=step, best_step=None)

        first = seconds(lambda: save(0))
        writer.wait()
        for trial in range(TRIALS):
            whole.append(seconds(lambda t=trial: (save(2 * t + 1), writer.wait())))
            stall.append(seconds(lambda t=trial: save(2 * t + 2)))
            writer.wait()
            assert writer.cost is not None
            thread.append(writer.cost.thread_sec)
            path = folder / name_of(2 * trial + 2)
            reading.append(seconds(lambda p=path: read_verified(p)))
            data = read_verified(path)
            loading.append(seconds(lambda d=data: load_state(d)))
        writer.close()
    ratios = [s / w for s, w in zip(stall, whole, strict=True)]
    record = {
        "what": "a checkpoint of ResNet-18 with SGD momentum",
        "mib": round(len(data) / 2**20, 1),
        "n": TRIALS,
        "device": device,
        "machine": platform.processor() or platform.machine(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "save_waited_for": spread(whole),
        "stall_of_the_step": spread(stall),
        "stall_of_the_first_save_ms": round(1000 * first, 1),
        "stall_over_waited_for": round(statistics.median(ratios), 4),
        "thread_cpu": spread(thread),
        "read_and_verify": spread(reading),
        "load": spread(loading),
    }
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
