"""Every file in configs/ composes, and every network that one of them names works."""

from pathlib import Path

import pytest
import torch

from dist_train.config.compose import compose, describe
from dist_train.config.importing import import_callable

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*") if path.is_file())


def test_every_file_is_a_choice_of_a_group() -> None:
    assert FILES
    assert {len(path.parts) for path in FILES} == {2}
    assert {path.suffix for path in FILES} == {".yaml"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_composes_and_every_value_of_it_counts(path: Path) -> None:
    composed = compose([f"{path.parent.name}={path.stem}"])
    assert str(CONFIGS / path) in composed.origins.values()
    assert f"# {CONFIGS / path}" in describe(composed)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "experiment"], ids=str)
def test_an_experiment_names_its_run(path: Path) -> None:
    assert compose([f"experiment={path.stem}"]).config.experiment == path.stem


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "model"], ids=str)
def test_every_network_gives_logits(path: Path) -> None:
    model = compose([f"model={path.stem}"]).config.model
    factory = import_callable(model.factory, "model.factory")
    with torch.device("meta"):  # shapes without numbers: large networks cost nothing
        logits = factory(num_classes=7, **model.args)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 7)
