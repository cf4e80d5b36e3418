"""Channels last where it was measured to gain; one form for filters, batches and a resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
import yaml
from torch import nn

from dist_train import models
from dist_train.config.earlier import BEGUN_WITHOUT, LATER
from dist_train.memory_format import laid_out, lay_out, memory_format_in_force
from dist_train.train import train
from tests.ranks import run_ranks
from tests.settings import small

SHORT = ("train.epochs=null", "log_every=1", "eval.every_epochs=null", "optim.schedule=constant")


def depthwise_net(num_classes: int) -> nn.Module:
    """A net that auto lays out contiguous."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def strided_net(num_classes: int) -> nn.Module:
    """A net with the layer whose gradient overwrites memory in channels_last."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 1, stride=2),
        nn.Conv2d(16, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def patches_net(num_classes: int) -> nn.Module:
    """What a vision transformer begins with."""
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(), nn.Linear(72, num_classes))


def trained(folder: Path, *words: str, ranks: int = 1) -> dict[str, Any]:
    return run_ranks(train, ranks, small(folder, *SHORT, *words))[0]


@pytest.mark.parametrize(
    ("factory", "kind", "precision", "form"),
    [
        (models.resnet9, "cpu", "bf16", "channels_last"),
        (models.speed_net, "cpu", "bf16", "channels_last"),
        (models.tutorial_cnn, "cpu", "fp32", "channels_last"),
        (tv.resnet18, "cpu", "fp32", "channels_last"),
        (tv.resnext50_32x4d, "cpu", "bf16", "channels_last"),
        (tv.mobilenet_v3_small, "cpu", "bf16", "contiguous"),
        (depthwise_net, "cpu", "fp32", "channels_last"),
        (depthwise_net, "cpu", "bf16", "contiguous"),
        (strided_net, "cpu", "fp32", "contiguous"),
        (strided_net, "cpu", "bf16", "channels_last"),
        (patches_net, "cpu", "bf16", "contiguous"),
        (tv.resnet18, "cuda", "fp32", "contiguous"),
        (tv.mobilenet_v3_small, "cuda", "bf16", "channels_last"),
        (depthwise_net, "cuda", "fp16", "channels_last"),
    ],
)
def test_auto_is_channels_last_where_it_was_measured_to_gain(
    factory: Any, kind: str, precision: str, form: str
) -> None:
    with torch.device("meta"):
        net = factory(num_classes=10)
    assert memory_format_in_force("auto", net, precision, kind) == form
    for asked in ("channels_last", "contiguous"):
        assert memory_format_in_force(asked, net, precision, kind) == asked


def test_filters_are_laid_out_and_stay_the_same_parameters() -> None:
    net = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3)])
    first, second = net[0], net[1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    second.weight = first.weight
    values, known = first.weight.detach().clone(), list(net.parameters())
    lay_out(net, "channels_last")
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not first.weight.is_contiguous()
    assert second.weight is first.weight
    assert [id(p) for p in net.parameters()] == [id(p) for p in known]
    lay_out(net, "contiguous")
    assert first.weight.is_contiguous()
    assert torch.equal(first.weight, values)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_lie_as_they_should_whatever_the_number_of_channels(channels: int) -> None:
    images = torch.rand(4, 6, 5, channels).permute(0, 3, 1, 2)  # as decoded pictures lie
    plain = laid_out(images, "contiguous")
    assert plain.stride() == (30 * channels, 30, 5, 1)
    assert torch.equal(plain, images)
    assert laid_out(plain, "contiguous") is plain or channels == 1
    assert laid_out(images, "channels_last") is images


@pytest.mark.parametrize("form", ["channels_last", "contiguous"])
@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_a_network_sees_the_form_in_force(
    form: str, loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    forward = nn.Conv2d.forward

    def look(self: nn.Conv2d, input: torch.Tensor) -> torch.Tensor:
        if input.shape[1] == 3:
            for name, tensor in (("images", input), ("filters", self.weight)):
                wide = tensor.is_contiguous(memory_format=torch.channels_last)
                seen.add((name, "channels_last" if wide else "contiguous"))
        return forward(self, input)

    monkeypatch.setattr(nn.Conv2d, "forward", look)
    words = [f"model.memory_format={form}", f"data.loader={loader}", "data.num_workers=0"]
    words += ["data.image_size=12", "train.steps=2", "data.mixup=0.2"]
    summary = train(small(tmp_path / "run", *SHORT, *words))
    assert summary["memory_format"] == form
    assert seen == {("images", form), ("filters", form)}


@pytest.mark.slow
def test_a_form_that_may_overwrite_memory_is_left_to_who_asks_for_it(tmp_path: Path) -> None:
    words = ("model.factory=tests.test_memory_format:strided_net", "train.steps=1")
    assert trained(tmp_path / "auto", *words)["memory_format"] == "contiguous"
    asked = trained(tmp_path / "asked", *words, "model.memory_format=channels_last")
    assert asked["memory_format"] == "channels_last"
    told = (tmp_path / "asked" / "log" / "rank0.txt").read_text()
    assert "torch's gradient of layer '0' (1x1, with a stride) may overwrite memory" in told
    assert "overwrite memory" not in (tmp_path / "auto" / "log" / "rank0.txt").read_text()


@pytest.mark.slow
def test_a_resume_in_the_other_form_goes_on(tmp_path: Path) -> None:
    """Only last bits differ; momentum that was saved in one form is taken up in the other."""
    folder = tmp_path / "run"
    trained(folder, "train.steps=3", "model.memory_format=channels_last", ranks=2)
    words = ("train.steps=6", "resume_allow=[model.memory_format]")
    moved = trained(folder, *words, "model.memory_format=contiguous", ranks=2)
    assert moved["memory_format"] == "contiguous"
    told = (folder / "log" / "rank0.txt").read_text()
    assert "model.memory_format is contiguous and was channels_last" in told
    unbroken = trained(tmp_path / "other", "train.steps=6", "model.memory_format=contiguous")
    # As fused kernels see it momentum in other strides is that of other weights.
    assert moved["eval_loss"] == pytest.approx(unbroken["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_of_before_there_was_a_choice_goes_on_with_channels_last(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    factory = "model.factory=tests.test_memory_format:patches_net"
    begun = trained(folder, factory, "train.steps=2", "model.memory_format=channels_last")
    assert begun["memory_format"] == "channels_last"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key in LATER:
        group, _, name = key.partition(".")
        del config[group][name]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = json.loads((folder / "environment.json").read_text())
    environment.pop(BEGUN_WITHOUT, None)
    (folder / "environment.json").write_text(json.dumps(environment))
    resumed = trained(folder, factory, "train.steps=4")
    assert resumed["memory_format"] == "channels_last"
    anew = trained(tmp_path / "new", factory, "train.steps=4")
    assert anew["memory_format"] == "contiguous"
