"""What a step makes the host wait for, by the runtime's own count. Run by test_emulated_gpu.py.

torch's debug mode, which tests/test_gpu.py asks, says nothing of a copy of pageable memory, nor of
an operator that waits to learn the size of its result.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_train.buffers import Buffers
from dist_train.claim import open_run
from dist_train.config import Config
from dist_train.data.loaders import open_data
from dist_train.distributed import single_process, start_ranks
from dist_train.gradients import FlatGradients
from dist_train.metrics import Meter
from dist_train.plan import make_plan
from dist_train.start import build_parts, open_feed
from dist_train.trial import throw_away_step
from tests.emulated_gpu.kernels import counted, emulated
from tests.ranks import run_ranks
from tests.settings import small

WARM_UP, MEASURED = 3, 4
SETTINGS = ("model.factory=tests.nets:noisy_net", "data.args.num_train=400")
WORKERS = ("data.loader=workers", "data.image_size=12")
ADAMW, MUON = ("optim.name=adamw", "optim.lr=0.001"), ("optim.name=muon", "optim.lr=0.01")
# What differs from the settings of all tests.
CASES: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("precision=bf16",),
    "fp16": ("precision=fp16",),
    "clipped and averaged": ("optim.clip_norm=1", "optim.ema_decay=0.99"),
    "mixup and cutmix": ("data.mixup=0.4", "data.cutmix=1"),
    "cutout": ("data.cutout=4", "data.flip=alternating"),
    "not augmented": ("data.crop_padding=0", "data.flip=false"),
    "in pieces": ("train.micro_batch_size=7",),
    "adamw": ADAMW,
    "adamw in fp16": (*ADAMW, "precision=fp16"),
    "muon": MUON,
    "muon in fp16": (*MUON, "precision=fp16"),
    "fixed order": ("train.order=fixed",),
    "loaded in the process": (*WORKERS, "data.num_workers=0"),
    "loaded by a worker and mixed": (*WORKERS, "data.num_workers=1", "data.cutmix=1"),
    "deterministic": ("deterministic=true",),
    "resnet9 with checkpointed activations": (
        "model.activation_checkpointing=true",
        "model.factory=dist_train.models:resnet9",
        "model.args.width=4",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step costs the host."""

    waits: int
    pageable: int = 0  # copies, each of which waits
    hidden: tuple[str, ...] = ()  # operators that wait without torch's telling


def costs(config: Config) -> list[Cost]:
    """Return what each of some steps costs."""
    from dist_train import train as loop

    found = []
    with emulated() as kernels, start_ranks(config) as ranks, open_run(config, ranks) as run:
        data = open_data(config, ranks)
        plan = make_plan(config, data.num_train, world_size=ranks.world_size)
        parts = build_parts(config, plan, data, run)
        throw_away_step(parts, data, step=0)
        feed = open_feed(parts, data, last_step=WARM_UP + MEASURED)
        meter = Meter(ranks, plan)
        for step in range(WARM_UP + MEASURED):
            kernels.hidden.clear()
            before = counted("waits"), counted("pageable")
            meter.add(loop.train_step(parts, feed, step=step))
            waits, pageable = counted("waits") - before[0], counted("pageable") - before[1]
            found.append(Cost(waits=waits, pageable=pageable, hidden=tuple(kernels.hidden)))
        parts.recovery.settle()
        parts.replica.close()
    return found[WARM_UP:]


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_once(case: str, tmp_path: Path) -> None:
    config = small(tmp_path, *SETTINGS, *CASES[case])
    assert run_ranks(costs, 1, config)[0] == [Cost(waits=1)] * MEASURED


@pytest.mark.parametrize("case", [case for case in CASES if "muon" not in case])  # it cannot lag
def test_a_step_whose_guard_lags_does_not_wait(case: str, tmp_path: Path) -> None:
    config = small(tmp_path, *SETTINGS, *CASES[case], "guards.lag=1")
    assert run_ranks(costs, 1, config)[0] == [Cost(waits=0)] * MEASURED


def test_gradients_of_two_types_are_gathered_by_two_kernels() -> None:
    params = [
        nn.Parameter(torch.zeros(2, 3, dtype=dtype, device="cuda"))
        for _ in range(30)
        for dtype in (torch.float32, torch.float64)
    ]
    with emulated() as kernels:
        gradients = FlatGradients(params, single_process())
        for number, param in enumerate(params):
            param.grad = torch.full_like(param, number)
        before = kernels.launches
        gradients.collect()
        assert kernels.launches - before == 2
        assert [int(view[1, 2]) for view in gradients.views] == list(range(60))


@pytest.mark.parametrize(("bad", "left"), [(0.0, 1.0), (1.0, 0.0)])
def test_buffers_of_a_skipped_step_are_put_back_by_three_kernels_a_type(
    bad: float, left: float
) -> None:
    net = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(20))).to("cuda")
    with emulated() as kernels:
        buffers, flag = Buffers(net), torch.full((), bad, device="cuda")
        held = [buffer for name, buffer in net.named_buffers() if not name.endswith("var")]
        starts = [kernels.launches]
        buffers.remember()
        starts.append(kernels.launches)
        for buffer in held:
            buffer.fill_(1.0)
        starts.append(kernels.launches)
        buffers.restore(flag)
        starts.append(kernels.launches)
        assert (starts[1] - starts[0], starts[3] - starts[2]) == (2, 1 + 3 * 2)
        assert {float(buffer.sum() / buffer.numel()) for buffer in held} == {left}
