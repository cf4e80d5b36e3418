"""Divergence and drift: found by all ranks at once, and taken back to the last good checkpoint."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train import replay
from dist_train.checkpoint import load_state
from dist_train.checkpoint_folder import list_checkpoints, read_verified
from dist_train.config import Config
from dist_train.drift import fingerprint
from dist_train.metrics import LossWatch
from tests.nets import noisy_net
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import metrics, small

SETTINGS = (
    "model.factory=tests.nets:noisy_net",
    "train.steps=24",
    "checkpoint.every_steps=5",
    "log_every=1",
    "guards.drift_every=4",
    "guards.max_consecutive=2",
    "optim.ema_decay=0.9",
    "optim.lr=0.02",
    "optim.schedule=constant",
)


def trained(config: Config, bad: dict[int, Any], rank: int | None) -> dict[str, Any]:
    """Train; on `rank` (None: on all), before step s of `bad`, do bad[s](parts) once.

    In generation 0 only.
    """
    from dist_train import train as loop

    left = dict(bad) if rank in (None, int(os.environ.get("RANK", "0"))) else {}
    real = loop.train_step

    def train_step(parts: Any, feed: Any, *, step: int, generation: int) -> Any:
        if step in left and generation == 0:
            left.pop(step)(parts)
        return real(parts, feed, step=step, generation=generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        summary = loop.train(config)
    assert not left, "the fault never fired"
    return summary


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(x) for x in (run / "events.jsonl").read_text().splitlines()]
    return [e for e in lines if e["event"] == kind]


def diverge(parts: Any) -> None:
    """Every picture of this rank is NaN from now on, in this generation."""

    def spoil(module: nn.Module, inputs: tuple[torch.Tensor]) -> Any:
        return (inputs[0] * torch.nan,) if module.training else None

    handle = parts.replica.module.register_forward_pre_hook(spoil)
    real = parts.guard.reset

    def reset() -> None:
        handle.remove()
        real()

    parts.guard.reset = reset


def diverge_once(parts: Any) -> None:
    """Every picture of this rank is NaN in one step."""

    def spoil(module: nn.Module, inputs: tuple[torch.Tensor]) -> Any:
        handle.remove()
        return (inputs[0] * torch.nan,)

    handle = parts.replica.module.register_forward_pre_hook(spoil)


@torch.no_grad()
def explode(parts: Any) -> None:
    """Make the weights so large, and still finite, that no gradient is finite from now on."""
    for param in parts.replica.module.parameters():
        param.fill_(3e38)


def ask_to_stop(parts: Any) -> None:
    """Stop at the next boundary."""
    os.kill(os.getpid(), signal.SIGTERM)


class Flip:
    """Flip one bit of a parameter, its momentum or its average, at an element of it."""

    def __init__(self, what: str, name: str, bit: int, place: int = 3) -> None:
        self.what, self.name, self.bit, self.place = what, name, bit, place

    def __call__(self, parts: Any) -> None:
        param = dict(parts.replica.module.named_parameters())[self.name]
        tensor = {
            "parameter": lambda: param.data,
            "momentum": lambda: parts.optimizer.state[param]["momentum_buffer"],
            "average": lambda: parts.ema.state_dict()[self.name],
        }[self.what]()
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1).view(-1)
        word = flat[self.place : self.place + 1].view(torch.int32)
        mask = torch.tensor(1 << self.bit if self.bit < 31 else -(1 << 31), dtype=torch.int32)
        word ^= mask


def test_divergence_goes_back_once_and_on_by_another_way(tmp_path: Path) -> None:
    config = small(tmp_path / "run", *SETTINGS)
    found = run_ranks(trained, 3, config, {12: diverge}, 1)
    assert found[0]["state"] == "finished"
    [back] = events(tmp_path / "run", "rolled_back")
    assert (back["step"], back["generation"]) == (10, 1)
    assert "step_00000010" in back["checkpoint"]
    [blamed, *_] = events(tmp_path / "run", "not_finite")
    assert blamed["step"] == 12
    assert "rank 1: the input of layer '0' is not finite" in blamed["culprits"][0]
    lines = metrics(tmp_path / "run")
    assert [m["step"] for m in lines if "train/loss" in m] == list(range(1, 25))
    rates = {m["step"]: m["train/learning_rate"] for m in lines if "train/loss" in m}
    assert rates[11] == pytest.approx(rates[10] / 2)
    files = sorted(f.name for f in (tmp_path / "run" / "bad_batches").glob("*.pt"))
    assert files == ["step_00000012_rank1.pt", "step_00000014_rank1.pt"]


def saved_steps(run: Path) -> list[int]:
    return [e["step"] for e in events(run, "saved")]


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_weights_that_only_skip_steps_are_no_good_checkpoint(lag: int, tmp_path: Path) -> None:
    # Saves are due after 10 and 15 steps; those from 13 on are skipped, and the fifth leads back.
    options = ("guards.max_consecutive=4", "checkpoint.keep_last=1", f"guards.lag={lag}")
    found = run_ranks(trained, 2, small(tmp_path, *SETTINGS, *options), {13: explode}, None)
    assert found[0]["state"] == "finished"
    [back] = events(tmp_path, "rolled_back")
    assert (back["step"], back["generation"]) == (10, 1)
    assert saved_steps(tmp_path)[:4] == [5, 9, 10, 15]
    assert events(tmp_path, "checkpoints_set_aside") == []


def test_a_save_after_a_skipped_step_is_made_after_the_next_good_one(tmp_path: Path) -> None:
    options = ("eval.every_steps=15", "checkpoint.keep_last=9")
    run_ranks(trained, 2, small(tmp_path, *SETTINGS, *options), {14: diverge_once}, 1)
    assert [e["step"] for e in events(tmp_path, "skipped_step")] == [14]
    assert saved_steps(tmp_path) == [5, 10, 16, 20, 24]
    progress = saved_progress(tmp_path / "checkpoints" / "step_00000016")
    assert (progress["evaluated_step"], progress["best_step"]) == (15, None), "15 is not saved"


@pytest.mark.slow
def test_a_stop_among_skipped_steps_saves_and_the_way_back_leads_past_it(tmp_path: Path) -> None:
    options = (*SETTINGS, "guards.max_consecutive=4", "checkpoint.keep_last=1")
    whole = run_ranks(trained, 0, small(tmp_path / "a", *options), {13: explode}, 0)[0]
    config = small(tmp_path / "b", *options)
    stopped = run_ranks(trained, 0, config, {13: explode, 14: ask_to_stop}, 0)[0]
    assert (stopped["state"], stopped["steps"]) == ("preempted", 15)
    names = sorted(path.name for path in (tmp_path / "b" / "checkpoints").glob("step_*"))
    assert names == ["step_00000009", "step_00000010", "step_00000015"], "best, good, the stop's"
    resumed = run_ranks(trained, 0, config, {}, 0)[0]
    [back] = events(tmp_path / "b", "rolled_back")
    assert (back["step"], back["generation"]) == (10, 1)
    skipped = [[e["step"] for e in events(tmp_path / x, "skipped_step")] for x in "ab"]
    assert skipped == [[13, 14, 15, 16, 17]] * 2, "a resume counts on"
    assert resumed["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_a_rollback_before_the_first_save_keeps_to_this_run_not_the_one_begun_with(
    tmp_path: Path,
) -> None:
    run_ranks(trained, 0, small(tmp_path / "a", *SETTINGS, "train.steps=9"), {}, 0)
    start = tmp_path / "a" / "checkpoints" / "step_00000009"
    options = (f"resume={start}", "checkpoint.every_steps=99", "optim.lr=1e-4")
    found = run_ranks(trained, 2, small(tmp_path / "b", *SETTINGS, *options), {10: diverge}, 1)
    [back] = events(tmp_path / "b", "rolled_back")
    assert (back["step"], back["checkpoint"]) == (9, "the start of the run")
    other = saved_progress(start)
    own = saved_progress(list_checkpoints(tmp_path / "b" / "checkpoints")[0])
    assert other["best_step"] == 9
    assert found[0]["best_step"] > 9
    assert own["tracker_id"] != other["tracker_id"]


def saved_progress(checkpoint: Path) -> dict[str, Any]:
    return load_state(read_verified(checkpoint))["progress"]


@pytest.mark.slow
@pytest.mark.parametrize("anomaly", [False, True])
def test_a_saved_batch_is_replayed_by_a_command(
    anomaly: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, *SETTINGS, "model.factory=tests.test_rollback:fragile_net")
    run_ranks(trained, 2, config, {2: break_a_picture}, 1)
    [skipped] = events(tmp_path, "not_finite")
    assert "the output of layer '0' is not finite (training samples" in skipped["culprits"][0]
    [file] = (tmp_path / "bad_batches").glob("*.pt")
    assert str(file) in skipped["culprits"][0]
    code = replay.main([str(file), *(["--anomaly"] if anomaly else [])])
    told = capsys.readouterr().out
    assert code == 0
    assert "the output of layer '0' is not finite" in told
    named = skipped["culprits"][0].split("(training samples ")[1].split(")")[0]
    assert f"training samples: {named}" in told
    assert len(named.split(",")) == 1
    assert ("returned nan values in its 0th output" in told) == anomaly


class Log(nn.Module):
    """log(x + 10): NaN for what is below -10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x + 10.0)


def fragile_net(num_classes: int) -> nn.Module:
    """Break on pictures with values below -10."""
    return nn.Sequential(Log(), nn.Flatten(), nn.Linear(432, num_classes))


def break_a_picture(parts: Any) -> None:
    """Give one picture of this rank's next batch a value that the network cannot take."""
    from dist_train.data.memory_loader import MemoryLoader

    real, patch = MemoryLoader._augmented, pytest.MonkeyPatch()

    def augmented(self: Any, *args: Any) -> Any:
        patch.undo()
        images, labels = real(self, *args)
        images[2, 0, 0, 0] = -11.0
        return images, labels

    patch.setattr(MemoryLoader, "_augmented", augmented)


def test_divergence_before_the_first_save_goes_back_to_the_start(tmp_path: Path) -> None:
    run_ranks(trained, 2, small(tmp_path, *SETTINGS), {1: diverge}, 0)
    [back] = events(tmp_path, "rolled_back")
    assert (back["step"], back["checkpoint"]) == (0, "the start of the run")


@pytest.mark.slow
def test_a_run_that_went_back_is_killed_and_resumes_its_own_way(tmp_path: Path) -> None:
    first = run_ranks(trained, 2, small(tmp_path / "a", *SETTINGS), {12: diverge}, 1)
    run_ranks(trained, 2, small(tmp_path / "b", *SETTINGS, "train.steps=18"), {12: diverge}, 1)
    resumed = run_ranks(trained, 2, small(tmp_path / "b", *SETTINGS), {}, 0)
    assert resumed[0]["weights_sha256"] == first[0]["weights_sha256"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = run_ranks(trained, 3, small(tmp_path_factory.mktemp("clean"), *SETTINGS), {}, 0)
    return found[0]["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["parameter", "momentum", "average"])
@pytest.mark.parametrize("bit", [0, 22, 30, 31])
def test_a_flipped_bit_in_a_replica_is_found_named_and_healed(
    what: str, bit: int, clean: str, tmp_path: Path
) -> None:
    name = {"parameter": "5.weight", "momentum": "11.weight", "average": "0.weight"}[what]
    flip = Flip(what, name, bit)
    found = run_ranks(trained, 3, small(tmp_path, *SETTINGS), {13: flip}, 1)
    assert found[0]["weights_sha256"] == clean
    back = events(tmp_path, "rolled_back")
    if not back:  # a decaying state may have lost the bit by itself, in all that follows
        assert what != "parameter"
        assert bit < 22
        return
    assert "rank 1 against 2 others" in back[0]["reason"]
    assert (back[0]["step"], back[0]["generation"]) == (10, 0)


def frozen_net(num_classes: int) -> nn.Module:
    """noisy_net whose first layer is not trained."""
    net = noisy_net(num_classes)
    net[0].requires_grad_(False)  # type: ignore[index] # it is a sequence
    return net


@pytest.mark.slow
def test_a_flipped_bit_in_a_frozen_parameter_is_found_too(tmp_path: Path) -> None:
    config = small(tmp_path, *SETTINGS, "model.factory=tests.test_rollback:frozen_net")
    run_ranks(trained, 3, config, {13: Flip("parameter", "0.weight", 20)}, 1)
    [back] = events(tmp_path, "rolled_back")
    assert "copies of 0.weight" in back["reason"]
    assert "rank 1 against 2 others" in back["reason"]


def test_two_ranks_cannot_say_which_of_them_is_wrong(tmp_path: Path) -> None:
    run_ranks(trained, 2, small(tmp_path, *SETTINGS), {13: Flip("parameter", "11.weight", 3)}, 1)
    [back] = events(tmp_path, "rolled_back")
    assert "no majority" in back["reason"]


def test_memory_that_is_damaged_again_and_again_ends_the_run(tmp_path: Path) -> None:
    outcomes = start_ranks_of(always_flipped, 2, small(tmp_path, *SETTINGS))
    assert all("after 3 returns to step 5 again" in str(o.error) for o in outcomes)


def always_flipped(config: Config) -> Any:
    """Flip a bit before step 7, however often it comes."""
    from dist_train import train as loop

    flip, real = Flip("parameter", "11.weight", 3), loop.train_step

    def train_step(parts: Any, feed: Any, *, step: int, generation: int) -> Any:
        if step == 7 and os.environ["RANK"] == "1":
            flip(parts)
        return real(parts, feed, step=step, generation=generation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        return loop.train(config)


def test_the_imaginary_part_belongs_to_the_fingerprint() -> None:
    tensor = torch.zeros(3, dtype=torch.complex64)
    before = fingerprint(tensor).item()
    torch.view_as_real(tensor)[1, 1] = 1.0
    assert fingerprint(tensor).item() != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_every_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    before = fingerprint(tensor).item()
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    bits = 8 * tensor.element_size()
    raw = tensor.permute(0, 2, 3, 1).reshape(-1).view(word)  # the same memory
    for bit in range(bits):
        mask = (1 << bit) if bit < bits - 1 else -(1 << (bits - 1))
        raw[11] ^= mask
        assert fingerprint(tensor).item() != before
        raw[11] ^= mask
    assert fingerprint(tensor).item() == before


def test_a_loss_that_jumps_is_reported() -> None:
    watch = LossWatch(3.0)
    assert [watch.add(x) for x in (2.3, 2.2, 2.1, 2.0, 1.9)] == [None] * 5
    assert watch.add(2.5) is None
    assert watch.add(9.0) == "the loss jumped to 9, from about 2.15 before"
    assert watch.add(float("inf")) is not None


def test_a_loss_spike_is_an_event_of_the_run(tmp_path: Path) -> None:
    run_ranks(trained, 2, small(tmp_path, *SETTINGS, "guards.loss_spike=1.5"), {13: spoil}, 1)
    [spike, *_] = events(tmp_path, "loss_spike")
    assert spike["step"] == 14


def spoil(parts: Any) -> None:
    """Make one batch's logits absurd on this rank."""
    module = parts.replica.module

    def once(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return output * 100

    handle = module.register_forward_hook(once)
