"""A settings file that would be huge once it is read is refused in one line, at once."""

import signal
from pathlib import Path

import pytest

from dist_train.config import ConfigError
from dist_train.config.compose import BUNDLED, CHECKOUT, compose
from dist_train.config.yaml_limits import MAX_BYTES, MAX_NODES, check_yaml


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines) + "\n"


HUGE = {
    "anchors": bomb(9),
    "merged anchors": "a: &a {x: 1, y: 2}\n"
    + "".join(f"b{n}: {{<<: *a, z: *a}}\n" for n in range(MAX_NODES // 6)),
    "holds itself": "a: &a [*a]\n",
    "depth": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "many values": "a: [" + "x, " * MAX_NODES + "x]\n",
    "length": "seed: 1\n" + "#" * MAX_BYTES,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(HUGE[name])
    signal.alarm(10)  # ends a test that would never return
    try:
        with pytest.raises(ConfigError, match=r"--config .*settings\.yaml (stands for|is longer)"):
            compose([], config_file=path)
    finally:
        signal.alarm(0)


def test_a_huge_file_of_the_users_own_groups_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(bomb(9))
    with pytest.raises(ConfigError, match=r"mine\.yaml stands for more than"):
        compose(["model=mine"], config_dir=tmp_path)


def test_a_few_aliases_are_welcome(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("train: {steps: 1}\nmodel:\n  args: {widths: &w [8, 16], again: *w}\n")
    assert compose([], config_file=path).config.model.args["again"] == [8, 16]


def test_our_own_files_are_far_below_the_limits() -> None:
    files = list((BUNDLED if BUNDLED.is_dir() else CHECKOUT).rglob("*.yaml"))
    assert files
    for path in files:
        check_yaml(path, str(path))
