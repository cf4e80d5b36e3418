"""How ranks begin: the same weights on all of them, one precision, and no module too many."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train import build
from dist_train.build import agreed_precision
from dist_train.config import Config, ConfigError
from dist_train.distributed import start_ranks
from dist_train.parallel import Form, Replica
from tests.ranks import run_ranks
from tests.settings import small

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Parameters of two types, one of them frozen, and a buffer; all hold `value`."""

    def __init__(self, value: float, width: int = 3) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.full((4, 3, 2, 2), value))
        self.filters.data = self.filters.data.contiguous(memory_format=torch.channels_last)
        self.frozen = nn.Parameter(torch.full((width,), value), requires_grad=False)
        self.narrow = nn.Parameter(torch.full((2,), value, dtype=torch.bfloat16))
        self.register_buffer("statistic", torch.full((5,), value))
        self.register_buffer("count", torch.tensor(int(value)))


def weights_of(config: Config, width: int, form: Form) -> list[Tensor]:
    """Return this rank's tensors once wrapped; each rank starts from its own number."""
    with start_ranks(config) as ranks:
        net = Net(float(ranks.rank + 1), width if ranks.rank == 1 else 3)
        replica = Replica(net, ranks, config, form)
        found = [t.detach().clone() for t in (*net.parameters(), *net.buffers())]
        replica.close()
    return found


@pytest.mark.parametrize("form", [Form(name="flat"), Form(name="ddp")])
def test_all_ranks_begin_with_rank_0s_weights_and_buffers(form: Form, tmp_path: Path) -> None:
    for found in run_ranks(weights_of, 2, small(tmp_path / "run"), 3, form):
        for tensor in found:
            assert torch.equal(tensor, torch.ones_like(tensor))


def test_ranks_with_different_models_are_told_where(tmp_path: Path) -> None:
    outcomes = run_ranks(refusal, 2, small(tmp_path / "run"))
    assert set(outcomes) == {
        "the ranks have built different models: rank 0's tensor 1 is frozen (3,) torch.float32, "
        "strides (1,), rank 1's is frozen (7,) torch.float32, strides (1,); model.factory must not "
        "depend on the rank"
    }


def refusal(config: Config) -> str:
    """Return what a rank is told whose peer has another model."""
    try:
        weights_of(config, 7, Form(name="flat"))
    except ConfigError as error:
        return str(error)
    return "nothing"


def precision_of(config: Config, lacking: int) -> tuple[str, str | None]:
    """Return what a rank computes in, one of them without units for bf16."""
    with start_ranks(config) as ranks, pytest.MonkeyPatch.context() as patch:
        for name in ("_gains_from_bf16", "multiplies_bf16"):
            patch.setattr(build, name, lambda *_: ranks.rank != lacking)
        return agreed_precision(config, ranks)


@pytest.mark.parametrize(
    ("asked", "lacking", "precision", "told"),
    [
        ("auto", -1, "bf16", None),
        ("auto", 1, "fp32", "rank 1's CPU has no units for bf16"),
        ("bf16", 1, "bf16", "rank 1: precision=bf16: this CPU has no bf16 instructions"),
    ],
)
def test_all_ranks_compute_in_one_precision(
    asked: str, lacking: int, precision: str, told: str | None, tmp_path: Path
) -> None:
    config = small(tmp_path / "run", f"precision={asked}")
    for found, notice in run_ranks(precision_of, 2, config, lacking):
        assert found == precision
        assert (notice is None) if told is None else (told in (notice or ""))


RUN = """
import sys
from pathlib import Path
from dist_train.train import train
from tests.settings import small
for steps in (3, 6):
    words = (f"train.steps={steps}", "checkpoint.every_steps=3", *sys.argv[2:])
    train(small(Path(sys.argv[1]), *words))
print(*sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_run_and_its_resume_need_no_compiler(optim: str, tmp_path: Path) -> None:
    words = [str(tmp_path / "run"), f"optim.name={optim}"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "resumed from" in done.stdout
    heavy = {"torchvision", "torch._dynamo", "torch._inductor", "sympy", "wandb", "tensorboard"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def trained_on_mixed_hardware(config: Config, at: int) -> dict[str, Any]:
    """Train; rank 1 says that its processor is another one, and its weights go astray once."""
    import os

    from dist_train import start
    from dist_train import train as loop

    real, left = loop.train_step, {at}

    def train_step(parts: Any, feed: Any, *, step: int, **options: Any) -> Any:
        if os.environ["RANK"] == "1" and step in left:
            left.remove(step)
            next(iter(parts.replica.module.parameters())).data.mul_(1.0 + 1e-6)
        return real(parts, feed, step=step, **options)

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(start, "cpu_name", lambda: "an older processor")
        patch.setattr(loop, "train_step", train_step)
        return loop.train(config)


@pytest.mark.slow
def test_ranks_on_different_hardware_are_told_and_blamed_before_the_memory(tmp_path: Path) -> None:
    config = small(tmp_path, "train.steps=12", "guards.drift_every=4", "checkpoint.every_steps=2")
    run_ranks(trained_on_mixed_hardware, 2, config, 5)
    log = (tmp_path / "log" / "rank0.txt").read_text()
    assert "rank 1 computes on an older processor, threads=1, rank 0 on" in log
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    [back] = [line for line in lines if line["event"] == "rolled_back"]
    assert "an older processor" in back["reason"]
    assert "or memory was damaged" in back["reason"]


def made_empty(config: Config) -> tuple[bool, bool]:
    """Return whether algorithms are deterministic, and fill a tensor that is made empty."""
    with start_ranks(config):
        filled = bool(torch.empty(999).isnan().all())
        return torch.are_deterministic_algorithms_enabled(), filled


@pytest.mark.parametrize("how", ["deterministic=true", "train.order=fixed"])
def test_deterministic_algorithms_do_not_fill_empty_tensors(how: str, tmp_path: Path) -> None:
    assert run_ranks(made_empty, 0, small(tmp_path, how)) == [(True, False)]
