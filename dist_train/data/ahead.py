"""Batches that are copied to a GPU on a stream of their own, while the step before them runs."""

from collections.abc import Iterator

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def copied_ahead(batches: Iterator[Pair], device: torch.device) -> Iterator[Pair]:
    """Yield each batch on the device, where it was sent when the one before it was asked for.

    Does not wait for the device: its current stream waits for the copy. What goes wrong with a
    batch is raised when that batch is asked for; one for which the device has no memory ahead of
    its step is copied then.

    Args:
        batches: (images, labels), in pinned memory.
        device: a GPU.
    """
    beside = torch.cuda.Stream(device)
    coming = _sent(batches, device, beside)
    while coming is not None:
        if isinstance(coming, Exception):
            raise coming
        (images, labels), arrival = coming
        coming = _sent(batches, device, beside)
        current = torch.cuda.current_stream(device)
        if arrival is None:
            images, labels = (t.to(device, non_blocking=True) for t in (images, labels))
        else:
            current.wait_event(arrival)
            for tensor in (images, labels):
                tensor.record_stream(current)  # it is the other stream's memory
        yield images, labels


def _sent(
    batches: Iterator[Pair], device: torch.device, beside: torch.cuda.Stream
) -> tuple[Pair, torch.cuda.Event | None] | Exception | None:
    """Send the next batch; returns it, and when it is there, or what went wrong; None: no more."""
    try:
        images, labels = next(batches)
    except StopIteration:
        return None
    except Exception as error:
        return error
    try:
        with torch.cuda.stream(beside):
            sent = (images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            arrival = torch.cuda.Event()
            arrival.record()
    except torch.OutOfMemoryError:
        return (images, labels), None
    return sent, arrival
