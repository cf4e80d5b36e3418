"""Moments on the device's own time line: read when a block is over, so that nothing waits in it."""

import itertools
import time
from typing import Protocol

import torch


class Clock(Protocol):
    """Collects moments and returns the seconds between them."""

    def mark(self) -> None:
        """Note this moment."""

    def take(self) -> list[float]:
        """Return the seconds between the moments noted, and forget them. Waits for the device."""
        ...


class HostClock:
    """For a CPU: the moment is that of the call."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def mark(self) -> None:
        self._moments.append(time.perf_counter())

    def take(self) -> list[float]:
        moments, self._moments = self._moments, []
        return [b - a for a, b in itertools.pairwise(moments)]


class DeviceClock:
    """For a GPU: the moment is when the device comes to it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append(event)

    def take(self) -> list[float]:
        torch.cuda.synchronize(self._device)
        events, self._events = self._events, []
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
