"""Settings that are text keep the text that was typed; folders know the home, and are not empty."""

from pathlib import Path
from typing import Any

import pytest

from dist_train.config import ConfigError
from dist_train.config.compose import compose
from dist_train.config.schema import Config
from dist_train.config.text import FOLDERS, is_text
from dist_train.config.typed import flatten, leaves

LOOKS_LIKE_A_NUMBER = ["2026_11_30", "1e3", "007", "1_000", "0.10", "-5", "nan", "true", "False"]
FORMED = ("experiment", "model.factory", "data.name")  # none of their values is like a number
TEXTS = [key for key, hint in leaves(Config) if is_text(hint) and key not in FORMED]


def value(key: str, *words: str, **options: Any) -> Any:
    return flatten(compose([*words], **options).config)[key]


@pytest.mark.parametrize("key", TEXTS)
def test_text_on_the_command_line_keeps_its_letters(key: str) -> None:
    for text in LOOKS_LIKE_A_NUMBER if key == "run_dir" else ("1e3", "true"):
        assert value(key, f"{key}={text}") == text
        assert value(key, f"++{key}= {text} ") == text
    assert value("data.root", "data.root=null") is None
    assert value("run_dir", "run_dir=runs_${seed}", "seed=7") == "runs_7"
    assert value("run_dir", "run_dir=${seed}", "seed=7") == "7"
    assert value("seed", "seed=1_000") == 1000


def test_text_in_a_file_keeps_its_letters(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "data").mkdir()
    path = tmp_path / "experiment" / "mine.yaml"
    texts = {"a": "2026_11_30", "b": "yes", "c": "1e3", "d": "2026-01-01"}
    path.write_text(
        "# @package _global_\nrun_dir: {a}\ntracking: {{wandb: {{name: {b}, entity: {c}}}}}\n"
        "train: {{epochs: 1}}\ndata: {{root: {d}}}\n".format(**texts)
    )
    wanted = dict(
        zip(
            ("run_dir", "tracking.wandb.name", "tracking.wandb.entity", "data.root"),
            texts.values(),
            strict=True,
        )
    )
    (tmp_path / "data" / "own.yaml").write_text("root: 1_0\n")
    for composed in (
        compose(["experiment=mine"], config_dir=tmp_path),
        compose([], config_file=path),
    ):
        found = flatten(composed.config)
        assert {key: found[key] for key in wanted} == wanted
    assert value("data.root", "data=own", "experiment=quickstart", config_dir=tmp_path) == "1_0"


@pytest.mark.parametrize("key", FOLDERS)
def test_a_folder_knows_the_home_and_is_not_empty(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text in ("~/x y", '"~/x y"', "'~/x y'"):
        assert value(key, f"{key}={text}") == "/home/me/x y"
    assert value(key, f"{key}=~") == "/home/me"
    assert value(key, f"{key}=./~x") == "./~x"
    for text, told in (
        (
            "",
            f"{key} is empty, as of a variable that is not set: name a folder, or leave {key} out",
        ),
        ("' '", f"{key} is empty"),
        ("~nobody-here/x", "write the path, or ./~nobody-here/x for a folder of that name"),
    ):
        with pytest.raises(ConfigError) as raised:
            compose([f"{key}={text}"])
        assert told in str(raised.value)


def test_a_run_that_began_in_the_number_of_its_folder_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "20261130").mkdir()
    assert value("run_dir", "run_dir=2026_11_30") == "2026_11_30"
    (tmp_path / "20261130" / "config.yaml").touch()
    assert value("run_dir", "run_dir=2026_11_30") == "20261130"
    (tmp_path / "2026_11_30").mkdir()
    assert value("run_dir", "run_dir=2026_11_30") == "2026_11_30"
