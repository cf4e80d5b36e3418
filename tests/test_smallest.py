"""The smallest batches are tried before anything is trained, and hide no shortage of memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.data.loaders import Data
from dist_train.memory import largest_that_fits
from dist_train.plan import make_plan
from dist_train.smallest import SmallBatch, small_batches
from tests.mistakes import NO_GPU, only_line, told
from tests.ranks import start_ranks_of
from tests.settings import SMALL, small
from tests.step_faults import StepFault, faulty

NORM = "model.factory=tests.user_code:norm_net"
SQUEEZED = "model.factory=tests.user_code:squeezed_net"


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (
            0,
            [NORM, "train.drop_last=false", "train.global_batch_size=43"],  # 216 = 5 x 43 + 1
            "1 sample at once: the last step of an epoch (1 of 216 samples): set train.drop",
        ),
        (
            2,
            [NORM, "train.drop_last=false", "train.global_batch_size=107"],  # 216 = 2 x 107 + 2
            "1 sample at once: the last step of an epoch (2 of 216 samples): set train.drop",
        ),
        (
            0,
            [NORM, "train.global_batch_size=9", "train.micro_batch_size=2"],  # 2, 2, 2, 2, 1
            "1 sample at once: train.global_batch_size=9 is cut into pieces of 2 and of 1: set",
        ),
        (
            0,
            [SQUEEZED, "data.eval_batch_size=23"],  # 24 = 23 + 1
            "1 sample at once: the last batch of the val split: keep the first dimension",
        ),
    ],
)
def test_a_batch_of_one_is_refused_before_the_first_step(
    ranks: int, words: list[str], said: str, tmp_path: Path
) -> None:
    words = [*SMALL, *words, f"run_dir={tmp_path / 'run'}", "train.epochs=1"]
    outcomes = start_ranks_of(told, ranks, tmp_path, words, env=NO_GPU)
    assert {o.value[0] for o in outcomes} == {2}, outcomes[0].trace
    assert said in only_line(outcomes[0].value[1])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_last_step_that_never_comes_is_not_tried() -> None:
    nothing: Any = None
    data = Data(
        name="",
        classes=(),
        notice=None,
        remarks=(),
        loading="",
        augmentation="",
        image_size="",
        num_train=217,
        num_val=0,
        num_test=70,
        loader=nothing,
    )

    def found(*words: str) -> list[SmallBatch]:
        config = small("run", "train.drop_last=false", "data.eval_batch_size=70", *words)
        plan = make_plan(config, 217, world_size=1)
        return small_batches(config, plan, data, world_size=1, micro_batch_size=None)

    assert found("train.steps=9") == []
    assert [b.size for b in found("train.steps=10")] == [1]
    assert found("train.steps=10", "train.drop_last=true") == []


def fails(faults: tuple[StepFault, ...], config: Any) -> str:
    from dist_train import train as loop

    with faulty(faults):
        try:
            loop.train(config)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def test_batchnorm_does_not_hide_a_shortage_of_memory(tmp_path: Path) -> None:
    fault = StepFault(ranks=(0,), step=1, above=1, times=99)  # for more than one sample
    config = small(tmp_path, NORM, "train.steps=3", "train.global_batch_size=4")
    [outcome] = start_ranks_of(fails, 0, (fault,), config, env=NO_GPU)
    assert outcome.value.startswith(
        "StepFailedError: rank 0 failed at step 1: rank 0 ran out of memory at step 1 with "
        "micro-batches of 2 (OutOfMemoryError: CUDA out of memory (injected)), and BatchNorm needs "
        "more than one sample at once"
    ), outcome


def test_a_size_that_batchnorm_refuses_is_no_size_that_fits() -> None:
    norm = nn.BatchNorm1d(3)

    def attempt(size: int) -> None:
        if size > 1:
            raise torch.OutOfMemoryError
        norm(torch.zeros(size, 3))

    assert largest_that_fits(8, attempt) == 1
    with pytest.raises(ValueError, match="more than 1 value"):
        largest_that_fits(1, attempt)
