"""Networks with auxiliary logits: losses are summed as in their papers, the main one counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train import replay
from dist_train.data.batch import Batch
from dist_train.dry_run import describe
from dist_train.tasks import classification as task
from dist_train.tasks.outputs import UnknownOutputError, heads_of, main_logits
from tests.odd_nets import OneAux, TwoAux
from tests.ranks import run_ranks
from tests.settings import metrics, small
from tests.test_resumable import in_parts, refused, trained

NET = "model.factory=tests.odd_nets:Headed"


def batch_of(count: int, **more: Any) -> Batch:
    return Batch(images=torch.zeros(count, 3, 4, 4), labels=torch.arange(count) % 5, **more)


def logits(seed: int) -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_auxiliary_losses_count_as_in_the_papers(mixed: bool, smoothing: float) -> None:
    more: dict[str, Any] = {}
    if mixed:
        more = {"partner_labels": torch.arange(8).flip(0) % 5, "own_weight": torch.full((8,), 0.7)}
    batch = batch_of(8, **more)
    main, first, second = map(logits, (0, 1, 2))

    def loss(output: Any) -> Tensor:
        return task.loss_sum(output, batch, label_smoothing=smoothing)

    each = [loss(head) for head in (main, first, second)]
    two = each[0] + 0.3 * (each[1] + each[2])  # GoogLeNet, arXiv:1409.4842
    one = each[0] + 0.4 * each[1]  # Inception v3, arXiv:1512.00567
    torch.testing.assert_close(loss(TwoAux(main, second, first)), two)
    torch.testing.assert_close(loss(OneAux(main, first)), one)
    torch.testing.assert_close(loss({"logits": main, "aux_logits": first}), one)
    assert torch.equal(loss(OneAux(main, None)), each[0])
    assert torch.equal(loss({"logits": main}), each[0])
    if not mixed:
        plain = F.cross_entropy(main, batch.labels, reduction="sum", label_smoothing=smoothing)
        assert torch.equal(each[0], plain)


def test_the_main_logits_are_those_that_predict() -> None:
    batch = batch_of(8)
    right = F.one_hot(batch.labels, 5).float()
    output = TwoAux(right, -right, -right)
    _, correct = task.outcome(torch.zeros(()), output, batch)
    assert correct.all()
    assert task.eval_sums(output, batch)[1] == 8
    assert main_logits(output) is right


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ((logits(0), logits(1)), "a tuple"),
        ([logits(0)], "a list"),
        ({"out": logits(0)}, "'out' is not known"),
        ({"aux_logits": logits(0)}, "'logits' is missing"),
        ({"logits": logits(0), "features": logits(1)}, "'features' is not known"),
        ({"logits": [1.0]}, "'logits' is a list"),
        (None, "a NoneType"),
    ],
)
def test_other_outputs_are_unknown(output: Any, told: str) -> None:
    with pytest.raises(UnknownOutputError, match=told):
        heads_of(output)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("pair", ("returned a tuple for images (", "`aux_logits` (its loss counts 0.4)")),
        pytest.param("features", ("'features' is not known",), marks=pytest.mark.slow),
        pytest.param("narrow", ("gives 9 outputs, the data have 10",), marks=pytest.mark.slow),
    ],
)
def test_an_output_of_another_kind_is_refused(
    kind: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    line = refused(tmp_path, NET, f"model.args.kind={kind}")
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("two", "train.micro_batch_size=5"),
        *(
            pytest.param(kind, words, marks=pytest.mark.slow)
            for kind, words in (
                ("one", "train.order=fixed train.num_shards=4"),
                ("two", "parallel.sync=ddp"),
                ("dictionary", "train.micro_batch_size=auto eval.views=2"),
                ("two", "model.activation_checkpointing=true precision=bf16"),
            )
        ),
    ],
)
def test_a_training_with_auxiliary_heads_is_continued(
    kind: str, words: str, tmp_path: Path
) -> None:
    expected, found = in_parts(tmp_path, 2, NET, f"model.args.kind={kind}", *words.split())
    assert found == expected
    losses = [line["train/loss"] for line in metrics(tmp_path / "parts") if "train/loss" in line]
    assert losses[0] > 2.303 * (1.3 if kind != "two" else 1.5), "the sum of all heads"


def test_a_dry_run_knows_several_heads() -> None:
    assert "memory" in describe(small("unused", NET, "model.args.kind=two"))


@pytest.mark.slow
def test_a_batch_that_is_not_finite_in_one_head_is_found_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("model.args.kind=two", "model.args.bad=true", "train.steps=2", "log_every=1")
    run_ranks(trained, 0, small(tmp_path, NET, *words))
    [file] = (tmp_path / "bad_batches").glob("*.pt")
    assert replay.main([str(file)]) == 0
    assert "the loss is not finite" in capsys.readouterr().out


def blocks(config: Any) -> list[int]:
    """Take each way of steps that the benchmark measures."""
    from tests.test_bench import opened

    with opened(config) as (steps, _):
        times = [len(steps.block(way, 2)) for way in steps.ways]
        return [*times, len(steps.gradient_times())]


@pytest.mark.slow
def test_the_benchmark_measures_them(tmp_path: Path) -> None:
    found = run_ranks(blocks, 2, small(tmp_path, NET, "model.args.kind=two"))[0]
    assert set(found[:-1]) == {2}
    assert found[-1] > 0


@pytest.mark.slow
def test_googlenet_trains_and_is_continued(tmp_path: Path) -> None:
    words = ("model.factory=torchvision.models:googlenet", "model.args.init_weights=false")
    size = ("train.global_batch_size=4", "data.args.image_size=32")
    expected, found = in_parts(tmp_path, 0, *words, *size)
    assert found == expected
