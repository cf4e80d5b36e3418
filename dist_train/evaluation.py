"""Evaluation: every sample once, and the same numbers at any number of ranks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dist_train.build import autocast
from dist_train.data.batch import Batch
from dist_train.data.loaders import Data
from dist_train.preemption import StopRequest
from dist_train.state import Parts
from dist_train.tasks import classification as task


def evaluate(
    parts: Parts,
    data: Data,
    split: str,
    should_stop: Callable[[], bool] | None = None,
    *,
    views: int = 1,
) -> dict[str, float] | None:
    """Evaluate every sample of `split` exactly once. Collective, waits.

    Whole batches are dealt to the ranks and their sums added in order: the same numbers at any
    world size. Rank 0's buffers count.

    Args:
        parts: what is evaluated.
        data: where the split is.
        split: its name.
        should_stop: asked between batches.
        views: also give the accuracy of the mean over so many views of each picture.

    Returns:
        loss, accuracy, top5 (fractions), samples, and with several views views_accuracy; None if a
        rank asked to stop in between.
    """
    replica, ranks = parts.replica, parts.replica.ranks
    ranks.pulse.enter("evaluation")
    replica.agree_on_buffers()
    replica.module.eval()
    count = data.loader.num_eval_batches(split)
    sums = torch.zeros(count, 5, dtype=torch.float64, device=ranks.device)
    batches = data.loader.eval_batches(split, ranks.rank, ranks.world_size)
    try:
        for _ in range(-(-count // ranks.world_size)):
            failure = None
            ranks.pulse.begin_batch()
            try:
                _evaluate_next(parts, batches, sums, views)
            except Exception as error:
                failure = parts.recovery.contain(error)
            flags = [should_stop is not None and should_stop(), failure is not None]
            stops, failures = ranks.control_sum(torch.tensor(flags, dtype=torch.float32)).tolist()
            if failures:
                parts.recovery.fail(failure, f"in the evaluation of the {split} split")
            if stops:
                return None
    finally:
        replica.module.train()
    rows = ranks.read_sum(sums)  # each row is one rank's, the rest add zeros
    loss, top1, top5, samples, of_views = (sum(column) for column in zip(*rows, strict=True))
    result = {
        "loss": loss / samples,
        "accuracy": top1 / samples,
        "top5": top5 / samples,
        "samples": int(samples),
    }
    return result if views == 1 else result | {"views_accuracy": of_views / samples}


@torch.no_grad()
def _evaluate_next(
    parts: Parts, batches: Iterator[tuple[int, Batch]], sums: Tensor, views: int
) -> None:
    """Add the next batch that is dealt to this rank, if there is one, to its row of `sums`."""
    dealt = next(batches, None)
    if dealt is None:
        return
    number, batch = dealt
    batch = batch.in_form(parts.memory_format)
    with autocast(parts.precision, batch.images.device):
        logits = parts.replica.module(batch.images)
        if views > 1:
            mean = task.mean_over_views(parts.replica.module, batch.images, logits, views)
            sums[number, 4] = task.eval_sums(mean, batch)[1]
    sums[number, :4] = task.eval_sums(logits, batch)


def evaluate_weights(
    parts: Parts, data: Data, split: str, stop: StopRequest, *, views: int = 1
) -> dict[str, float] | None:
    """Evaluate the weights; with an average of them both, and the average's numbers count."""

    def asked() -> bool:
        return stop.reason is not None

    result = evaluate(parts, data, split, asked, views=views)
    if parts.ema is None or result is None:
        return result
    parts.ema.swap()
    try:
        averaged = evaluate(parts, data, split, asked, views=views)
    finally:
        parts.ema.swap()
    return None if averaged is None else averaged | {"raw_accuracy": result["accuracy"]}
