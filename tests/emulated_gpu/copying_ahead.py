"""Batches of workers reach a GPU ahead of their step. Run by test_emulated_gpu.py."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_train.data.ahead import copied_ahead
from tests.emulated_gpu.kernels import emulated

GPU = torch.device("cuda", 0)
Pair = tuple[Tensor, Tensor]


def batches(asked: list[int], broken: int | None = None) -> Iterator[Pair]:
    for number in range(4):
        asked.append(number)
        if number == broken:
            raise OSError(f"batch {number}")
        yield torch.full((5,), float(number)).pin_memory(), torch.tensor([number]).pin_memory()


def test_a_batch_is_sent_when_the_one_before_it_is_asked_for() -> None:
    asked: list[int] = []
    seen = []
    with emulated():
        for images, labels in copied_ahead(batches(asked), GPU):
            assert images.device == labels.device == GPU
            seen.append((asked[-1], (images + labels).tolist()))
    assert seen == [(min(n + 1, 3), [2.0 * n] * 5) for n in range(4)]


def test_what_goes_wrong_with_a_batch_is_raised_at_its_own_step() -> None:
    with emulated():
        sent = copied_ahead(batches([], broken=2), GPU)
        assert [labels.item() for _, labels in (next(sent), next(sent))] == [0, 1]
        with pytest.raises(OSError, match="batch 2"):
            next(sent)


def test_a_batch_that_finds_no_memory_ahead_is_copied_at_its_step() -> None:
    to, refused = Tensor.to, []

    def without_memory(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if torch.cuda.current_stream() != torch.cuda.default_stream() and tensor.dim() != 0:
            refused.append(tensor)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(tensor, *args, **options)

    with emulated(), mock.patch.object(Tensor, "to", without_memory):
        seen = [(images + labels).sum().item() for images, labels in copied_ahead(batches([]), GPU)]
    assert len(refused) == 4
    assert seen == [0.0, 10.0, 20.0, 30.0]


def nothing(*_args: Any) -> None:
    pass


@pytest.mark.parametrize("wait", [torch.cuda.Stream.wait_event, nothing])
def test_a_step_that_does_not_wait_for_the_copy_is_seen(wait: Callable[..., None]) -> None:
    def use() -> None:
        with emulated(), mock.patch.object(torch.cuda.Stream, "wait_event", wait):
            for images, _ in copied_ahead(batches([]), GPU):
                images.add_(1)

    if wait is nothing:
        with pytest.raises(AssertionError, match="used 4 times before its copy was waited for"):
            use()
    else:
        use()
