"""Every file in configs/ composes, and every network that one of them names works."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from dist_train.config import ConfigError
from dist_train.config.compose import NO_SETTINGS, compose, describe
from dist_train.config.importing import import_callable
from launch.job_settings import HELP, JobSettings, read_settings

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*") if path.is_file())
SETTINGS = [path for path in FILES if path.parent.name != NO_SETTINGS]
CLUSTERS = [path for path in FILES if path.parent.name == NO_SETTINGS]


def test_every_file_is_a_choice_of_a_group() -> None:
    assert FILES
    assert {len(path.parts) for path in FILES} == {2}
    assert {path.suffix for path in FILES} == {".yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("path", SETTINGS, ids=str)
def test_every_file_composes_and_every_value_of_it_counts(path: Path) -> None:
    words = ["data.root=mine"] if path.stem == "image_folder" else []
    composed = compose([f"{path.parent.name}={path.stem}", *words], explain=True)
    assert str(CONFIGS / path) in composed.origins.values()
    assert f"# {CONFIGS / path}" in describe(composed)


@pytest.mark.parametrize("path", CLUSTERS, ids=str)
def test_every_file_of_a_cluster_is_what_a_job_can_ask_for(path: Path) -> None:
    assert dataclasses.asdict(read_settings(CONFIGS / path))
    commented = re.sub(r"^# (?=\w+:|  -)", "", (CONFIGS / path).read_text(), flags=re.MULTILINE)
    assert set(yaml.safe_load(commented) or {}) <= set(HELP)


def test_the_default_of_a_cluster_names_every_key_and_sets_none() -> None:
    text = (CONFIGS / NO_SETTINGS / "default.yaml").read_text()
    assert yaml.safe_load(text) is None
    named = re.findall(r"^# (\w+):", text, re.MULTILINE)
    assert named == [field.name for field in dataclasses.fields(JobSettings)] == list(HELP)


def test_a_cluster_is_no_setting_of_a_run() -> None:
    with pytest.raises(ConfigError, match="belongs to dist-train submit --cluster default"):
        compose(["cluster=default"])


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "experiment"], ids=str)
def test_an_experiment_names_its_run(path: Path) -> None:
    assert compose([f"experiment={path.stem}"]).config.experiment == path.stem


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "experiment"], ids=str)
def test_an_experiment_leaves_the_precision_to_the_hardware(path: Path) -> None:
    assert compose([f"experiment={path.stem}"]).config.precision == "auto"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "model"], ids=str)
def test_every_network_gives_logits(path: Path) -> None:
    model = compose([f"model={path.stem}"]).config.model
    factory = import_callable(model.factory, "model.factory")
    with torch.device("meta"):  # shapes without numbers: large networks cost nothing
        logits = factory(num_classes=7, **model.args)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 7)
