"""Where a step stopped being finite: the rank, the layer and the samples, and a file to replay it.

The batch is run again, piece by piece with the same dropout, under hooks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.data.batch import Batch
from dist_train.distributed import Ranks
from dist_train.plain_state import plain
from dist_train.weights import ENTRIES

MAX_FILES = 3  # of one run: a batch with the weights is large
FOLDER = "bad_batches"
LossOf = Callable[[Batch], Tensor]
"""From a piece of a batch to its loss, 0-d, through the bare module, with the step's own seeds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Culprit:
    """The first place on a rank that is not finite."""

    rank: int
    place: str
    samples: list[int]  # indices into the training split; empty: cannot be told apart
    file: str | None  # what `dist-train replay` takes

    def __str__(self) -> str:
        """Say it in a line."""
        shown = ", ".join(str(i) for i in self.samples[:8])
        more = "" if len(self.samples) <= 8 else f" and {len(self.samples) - 8} more"
        of = f" (training samples {shown}{more})" if self.samples else ""
        command = f"; see it again: dist-train replay {self.file}" if self.file else ""
        return f"rank {self.rank}: {self.place}{of}{command}"


def find_culprits(
    ranks: Ranks,
    module: nn.Module,
    pieces: list[Batch],
    loss_of: LossOf,
    *,
    state: Callable[[], dict[str, Any]],
    indices: list[int],
    folder: Path,
    context: dict[str, Any],
) -> list[Culprit]:
    """Run this rank's pieces of a step again and tell all ranks what each found. Collective.

    Args:
        ranks: the ranks.
        module: the bare model, as it was before the step.
        pieces: of this rank, in order.
        loss_of: see LossOf.
        state: returns the module's, as weights_of does.
        indices: the training sample of each of this rank's positions.
        folder: the run's; the culprit's piece is saved in it.
        context: plain values to be saved with it: what a replay needs to know.
    """
    mine: Culprit | None = None
    done = 0
    for part in pieces:
        try:
            found = first_non_finite(module, lambda p=part: loss_of(p), len(part))
        except Exception as error:  # the peers wait for an answer; the run goes on without it
            found = f"could not be run again ({type(error).__name__}: {error})", []
        if found is not None:
            place, rows = found
            of_piece = indices[done : done + len(part)]
            samples = [of_piece[row] for row in rows]
            ranks.pulse.enter("checkpoint")  # weights and batch go to the disk
            file = _save(folder, ranks.rank, part, state(), context | {"samples": of_piece})
            mine = Culprit(rank=ranks.rank, place=place, samples=samples, file=file)
            break
        done += len(part)
    return [culprit for culprit in ranks.gather(mine) if culprit is not None]


def first_non_finite(
    module: nn.Module, loss_of_piece: Callable[[], Tensor], count: int
) -> tuple[str, list[int]] | None:
    """Return the first place of a forward and backward that is not finite and its rows, or None.

    Args:
        module: the bare model.
        loss_of_piece: forwards a piece through it and returns the loss, 0-d.
        count: samples of the piece; rows are told for tensors with as many.
    """
    found: list[tuple[str, list[int]]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for what, tensor in (*(("input", x) for x in inputs), ("output", output)):
                if not found and isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    text = f"the {what} of layer {name!r} is not finite"
                    found.append((text, _bad_rows(tensor, count)))

        return look

    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights {name!r} are not finite", []
    layers = [(n, m) for n, m in module.named_modules() if not list(m.children())]
    handles = [layer.register_forward_hook(hook(name or "model")) for name, layer in layers]
    try:
        loss = loss_of_piece()
        if found:
            return found[0]
        if not torch.isfinite(loss):
            return "the loss is not finite although every layer's output is", []
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        # Backward runs from the last layer to the first: the last bad one is where it began.
        for (name, _), grad in reversed(list(zip(named, grads, strict=True))):
            if grad is not None and not torch.isfinite(grad).all():
                return f"the gradient of {name!r} is not finite", []
        return None
    finally:
        for handle in handles:
            handle.remove()


def load_bad_batch(path: Path) -> tuple[Batch, dict[str, Any], dict[str, Any]]:
    """Return (piece, what load_weights takes, context) of a saved file. Runs no code of it."""
    held = torch.load(path, map_location="cpu", weights_only=True)
    weights = {key: held[key] for key in ENTRIES if key in held}
    return Batch(**held["batch"]), weights, held["context"]


def _bad_rows(tensor: Tensor, count: int) -> list[int]:
    if tensor.ndim == 0 or tensor.shape[0] != count:
        return []
    bad = ~torch.isfinite(tensor.detach().reshape(count, -1)).all(dim=1)
    rows = bad.nonzero().flatten().tolist()
    return [] if len(rows) == count > 1 else rows  # all of them: it came from elsewhere


def _save(
    folder: Path, rank: int, part: Batch, state: dict[str, Any], context: dict[str, Any]
) -> str | None:
    """Save a piece with the weights; None if there are enough files or the disk refuses."""
    target = folder / FOLDER
    path = target / f"step_{context['step']:08d}_rank{rank}.pt"
    fields = {name: _host(getattr(part, name)) for name in part.__dataclass_fields__}
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not path.exists() and len(list(target.glob("*.pt"))) >= MAX_FILES:
            return None
        held = plain(state, lambda tensor, _: _host(tensor))
        torch.save({"batch": fields, **held, "context": context}, path)
    except (OSError, RuntimeError):  # torch.save turns a full disk into the latter
        path.unlink(missing_ok=True)
        return None
    return str(path)


def _host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
