"""Do all ranks still hold the same weights? Sums over bits, compared now and then.

A flipped bit in one replica's weights or optimizer state changes nothing that a loss or a gradient
would show; it only makes the ranks train different networks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dist_train.distributed import Ranks
from dist_train.optim import Ema
from dist_train.recovery import RollBack

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element

DAMAGED = "memory of one of them was damaged"


class DriftCheck:
    """Compares parameters, optimizer state and averaged weights of all ranks, tensor by tensor.

    Frozen parameters, too. No buffers: BatchNorm's statistics are each rank's own, rank 0's are the
    run's and reach the others before every evaluation; in fixed order each step makes them anew.
    """

    def __init__(
        self,
        ranks: Ranks,
        named_params: Sequence[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        *,
        every: int,
        cause: str = DAMAGED,
    ) -> None:
        """Make it.

        Args:
            ranks: whose copies are compared.
            named_params: the parameters by name.
            optimizer: theirs; what it keeps of them is compared, too.
            ema: averaged weights, if there are any.
            every: steps from check to check.
            cause: what a difference means on these machines, in words.
        """
        self._cause = cause
        self._ranks = ranks
        self._named_params = named_params
        self._optimizer = optimizer
        self._ema = ema
        self._every = every
        self._last = -1

    def due(self, step: int) -> bool:
        """Say whether a check belongs after `step` steps: the same answer on all ranks."""
        return self._ranks.world_size > 1 and step > 0 and step % self._every == 0

    def check(self, step: int) -> None:
        """Compare, unless it was done at this very step. Collective, waits for the device.

        Raises:
            RollBack: they differ; names the first tensor and, from three ranks on, the odd rank.
        """
        if self._ranks.world_size == 1 or step == self._last:
            return
        named = list(self._named())
        mine = torch.stack([fingerprint(tensor) for _, tensor in named])
        table = mine.new_zeros(self._ranks.world_size, len(named))
        table[self._ranks.rank] = mine
        rows = self._ranks.read_sum(table)
        self._last = step
        columns = list(zip(*rows, strict=True))
        odd = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if odd:
            name = named[odd[0]][0]
            more = f" and {len(odd) - 1} other tensors" if len(odd) > 1 else ""
            frozen = any(n == name and not p.requires_grad for n, p in self._named_params)
            model = ", or the model changes it in its forward: make it a buffer" if frozen else ""
            raise RollBack(
                f"the ranks' copies of {name}{more} differ after {step} steps "
                f"({_who(columns[odd[0]])}): {self._cause}{model}",
                new_order=False,
            )

    def forget(self) -> None:
        """Check again also at a step that was checked: the run went back."""
        self._last = -1

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self._named_params:
            yield name, param
            for key, value in self._optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    yield f"{key} of {name}", value
        if self._ema is not None:
            for name, value in self._ema.state_dict().items():
                yield f"average of {name}", value


def fingerprint(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements taken as integers, 0-d int64, on its device.

    Any single flipped bit changes it: by a power of two, which no 64-bit sum of this length loses.
    """
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return plain.detach().view(INTEGERS[plain.element_size()]).sum(dtype=torch.int64)


def _who(values: tuple[int, ...]) -> str:
    """Name the ranks outside the majority."""
    common, count = Counter(values).most_common(1)[0]
    if 2 * count <= len(values):
        return "no majority: it cannot be said which rank is wrong"
    ranks = [str(rank) for rank, value in enumerate(values) if value != common]
    return f"rank {', '.join(ranks)} against {count} others"
