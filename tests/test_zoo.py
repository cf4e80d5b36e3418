"""What `make zoo` tells of a network; the smallest of each of torchvision's families."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torchvision
from torch import nn

from benchmarks.zoo import networks as zoo
from benchmarks.zoo import table
from benchmarks.zoo.networks import Network, fit, networks, size_gib
from benchmarks.zoo.trial import CRASHED, DIFFERENT, LARGE, REFUSED, SAME, attempt
from tests.nets import noisy_net

# The smallest of each of torchvision's families.
SMALLEST = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11",
    "vit_b_16",
)


class Own(Network):
    """A network of this file's."""

    @property
    def factory(self) -> str:
        return f"tests.test_zoo:{self.name}"


def crashing(num_classes: int) -> nn.Module:
    """Ends a rank by a signal, once the shapes have been looked at."""
    if "RANK" in os.environ:
        os.kill(os.getpid(), signal.SIGSEGV)
    return noisy_net(num_classes)


def refused(num_classes: int) -> nn.Module:
    """Gives other outputs than there are classes."""
    return nn.Sequential(*noisy_net(num_classes).children(), nn.Linear(num_classes, 3))


class Forgetful(nn.Module):
    """A network with a state that no checkpoint holds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.net = noisy_net(num_classes)
        self.calls = 0

    def forward(self, images: Any) -> Any:
        self.calls += self.training
        return self.net(images) * self.calls


def large(num_classes: int) -> nn.Module:
    """Has too many parameters to be run, and no memory for them on the meta device."""
    return nn.Sequential(noisy_net(num_classes), nn.Linear(num_classes, 16_000_000))


def test_every_family_of_torchvision_is_among_those_tried() -> None:
    listed = torchvision.models.list_models(module=torchvision.models)
    tried = {network.name for network in networks() if network.source == "torchvision"}
    assert tried == set(listed)
    family = {name: torchvision.models.get_model_builder(name).__module__ for name in listed}
    assert sorted(family[name] for name in SMALLEST) == sorted(set(family.values()))
    assert len(set(zoo.TIMM)) == len(zoo.TIMM) >= 60


@pytest.mark.parametrize(
    ("name", "side", "args"),
    [
        ("squeezenet1_1", 64, {}),
        ("vit_b_16", 64, {"image_size": 64}),
        ("maxvit_t", 224, {}),
    ],
)
def test_a_network_is_tried_on_the_smallest_images_it_takes(
    name: str, side: int, args: dict[str, int]
) -> None:
    found = fit(Network(source="torchvision", name=name))
    assert (found.side, found.args) == (side, args)
    assert found.parameters > 500_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outcome", "told"),
    [
        ("noisy_net", SAME, ""),
        ("refused", REFUSED, "gives 3 outputs, the data have 10 classes"),
        ("crashing", CRASHED, "SIGSEGV"),
        ("Forgetful", DIFFERENT, "weights after 2, 2 + 2 and 4 steps"),
        ("large", LARGE, ""),
    ],
)
def test_what_comes_of_a_network_is_told(name: str, outcome: str, told: str) -> None:
    record = attempt(Own(source="torchvision", name=name))
    assert record["outcome"] == outcome, record
    assert told in record.get("told", "")
    assert f"| {outcome}" in table.page([record]) or outcome == LARGE


def test_a_large_network_is_listed_with_the_memory_it_needs(tmp_path: Path) -> None:
    record = {"source": "torchvision", "name": "vit_h_14", "version": "1", "date": "2026-12-01"}
    record |= {"outcome": LARGE, "parameters": 2**28, "gib": size_gib(2**28, 0)}
    assert "| torchvision vit_h_14 | 268.4 | 5.0 |" in table.page([record])
    path = tmp_path / "zoo.jsonl"
    path.write_text('{"source": "timm", "name": "a"}\n{"source": "timm", "na')
    assert list(table.latest(path)) == [("timm", "a")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SMALLEST)
def test_a_network_of_torchvision_is_continued_to_the_bit(name: str) -> None:
    record = attempt(Network(source="torchvision", name=name))
    assert record["outcome"] == SAME, record
