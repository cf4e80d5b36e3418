"""The batches of a run by step; one that could not be loaded can be asked for again."""

import time
from collections.abc import Iterator

from dist_train.data.batch import Batch
from dist_train.data.loaders import Loader
from dist_train.order import GlobalOrderSampler


class Feed:
    """Hands out this rank's batch of a step; the steps come in order, each as often as needed."""

    def __init__(
        self, loader: Loader, sampler: GlobalOrderSampler, last_step: int, memory_format: str
    ) -> None:
        self.sampler = sampler
        self._loader = loader
        self._last_step = last_step
        self._memory_format = memory_format
        self._batches: Iterator[Batch] | None = None
        self._next = -1  # the step that comes next out of `_batches`
        self._held: tuple[int, Batch] | None = None
        self._waited = 0.0

    def take(self, step: int) -> Batch:
        """Return the batch of `step`; raises whatever loading it raises, also when asked again."""
        if self._held is not None and self._held[0] == step:
            return self._held[1]
        self._held = None
        if self._batches is None or self._next != step:
            self._batches = self._loader.train_batches(self.sampler, step, self._last_step)
        batches, self._batches = self._batches, None  # a generator that raised is of no more use
        begun = time.perf_counter()
        batch = next(batches).in_form(self._memory_format)
        self._waited += time.perf_counter() - begun
        self._batches, self._next, self._held = batches, step + 1, (step, batch)
        return batch

    def take_waited_sec(self) -> float:
        """Return for how long the host has waited for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def samples(self, step: int) -> list[int]:
        """Return the training samples of this rank's batch of `step`, in order."""
        return self.sampler.take(step).indices.tolist()
