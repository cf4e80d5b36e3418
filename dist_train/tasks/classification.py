"""Picture classification: cross-entropy, top-1 and top-5, as sums over samples.

Legend: n pictures, k classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data.batch import Batch
from dist_train.tasks.outputs import Output, heads_of, main_logits


def loss_sum(output: Output, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy summed over the batch, 0-d; mixed labels are weighted.

    Of a network with auxiliary heads it is the weighted sum of theirs and the main one's.
    Half-precision logits are taken up to float32 first.
    """
    if isinstance(output, Tensor):
        return _cross_entropy(output, batch, label_smoothing)
    (_, main), *others = heads_of(output)
    loss = _cross_entropy(main, batch, label_smoothing)
    for weight, logits_nk in others:
        loss = loss + weight * _cross_entropy(logits_nk, batch, label_smoothing)
    return loss


def _cross_entropy(logits_nk: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    logits_nk = _wide(logits_nk)
    if batch.partner_labels is None or batch.own_weight is None:
        return F.cross_entropy(
            logits_nk, batch.labels, reduction="sum", label_smoothing=label_smoothing
        )
    own, other = (
        F.cross_entropy(logits_nk, labels, reduction="none", label_smoothing=label_smoothing)
        for labels in (batch.labels, batch.partner_labels)
    )
    return (batch.own_weight * own + (1 - batch.own_weight) * other).sum()


def outcome(loss: Tensor, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (summed loss, 0-d; which predictions are right, (n,) bool). Does not wait.

    The predictions are those of the main logits.
    """
    return loss.detach(), main_logits(output).argmax(1) == batch.labels


def eval_sums(output: Output, batch: Batch) -> Tensor:
    """Return (4,) float64 on the device: summed loss, top-1, top-5, samples; of the main logits."""
    logits_nk = main_logits(output)
    loss = F.cross_entropy(_wide(logits_nk), batch.labels, reduction="sum")
    best = logits_nk.topk(min(5, logits_nk.shape[1]), dim=1).indices == batch.labels[:, None]
    count = torch.full_like(loss, len(batch))
    return torch.stack(
        [loss.double(), best[:, :1].sum().double(), best.sum().double(), count.double()]
    )


def mean_over_views(
    model: Callable[[Tensor], Output], images: Tensor, output: Output, views: int
) -> Tensor:
    """Return the mean of the logits over several views of each picture, (n, k) float32.

    2: as it is and mirrored. 6: half the weight is theirs; the other half belongs to both of them
    moved by one pixel, up and left, and down and right, with the edges mirrored.

    Args:
        model: from pictures to logits.
        images: (n, c, h, w).
        output: the model's of `images`.
        views: 2 or 6.
    """

    def both(pictures: Tensor, known: Tensor | None = None) -> Tensor:
        upright = main_logits(model(pictures)) if known is None else known
        return (_wide(upright) + _wide(main_logits(model(pictures.flip(3))))) / 2

    mean = both(images, main_logits(output))
    if views == 2:
        return mean
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [both(padded[:, :, y : y + height, y : y + width]) for y in (0, 2)]
    return mean / 2 + (moved[0] + moved[1]) / 4


def _wide(logits_nk: Tensor) -> Tensor:
    return logits_nk.float() if logits_nk.dtype in (torch.float16, torch.bfloat16) else logits_nk
