"""The configuration: where values come from, what is refused, what makes a run what it is."""

import dataclasses
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dist_train.__main__ import main
from dist_train.config import Config, ConfigError, DataConfig, ParallelConfig, TrainConfig
from dist_train.config.arguments import parse
from dist_train.config.check import RANGES, check, check_pieces, check_world
from dist_train.config.compose import compose, describe, to_yaml
from dist_train.config.identity import (
    config_hash,
    full_hash,
    run_dir_of,
)
from dist_train.config.overrides import parse_override, quoted
from dist_train.config.typed import leaves
from dist_train.order import micro_batches, share
from tests.ranks import run_ranks
from tests.settings import small

TRAINABLE = Config(train=TrainConfig(epochs=1))
SECRET = "not-for-anybodys-eyes"
ROOT = Path(__file__).parents[1]
ODD = "B\u00fccher, it's a=(b[c{d\"e"  # what means something in Hydra's grammar, and what nothing


def refusal(*overrides: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        compose([*overrides], **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_print_config_shows_every_key_with_its_origin() -> None:
    words = ["experiment=cifar10_tutorial", "optim.lr=0.3", "model.args.width=8"]
    text = describe(compose(words, explain=True))
    rows = {line.split(":", 1)[0]: line for line in text.splitlines()}
    assert list(rows) == [key for key, _ in leaves(Config)]
    assert re.fullmatch(r"optim\.lr: 0\.3 +# command line", rows["optim.lr"])
    assert re.fullmatch(r"model\.args: \{'width': 8\} +# command line", rows["model.args"])
    assert re.fullmatch(r"train\.epochs: 4 +# .*/cifar10_tutorial\.yaml", rows["train.epochs"])
    assert re.fullmatch(r"model\.factory: .*# .*/tutorial_cnn\.yaml", rows["model.factory"])
    assert re.fullmatch(r"optim\.momentum: 0\.9 +# .*/sgd\.yaml", rows["optim.momentum"])
    assert re.fullmatch(r"train\.steps: null +# default", rows["train.steps"])


def test_print_config_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dist_train", "--print-config", "optim.lr=0.3"])
    assert main() == 0
    assert "optim.lr: 0.3" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_runs_own_file_gives_the_same_run(tmp_path: Path) -> None:
    config = small(tmp_path, "optim.ema_decay=0.99", "data.mean=[0.1,0.2,0.3]", "data.std=[1,1,1]")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = parse(["--config", str(tmp_path / "config.yaml")]).config
    assert again == config
    assert full_hash(again) == full_hash(config)
    changed = parse(["--config", str(tmp_path / "config.yaml"), "optim.lr=0.3"]).config
    assert config_hash(changed) != config_hash(config)


def test_a_file_of_settings_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim: {lrr: 0.1}\ntrain: {steps: 1}\n")
    assert refusal(config_file=path) == "unknown key 'optim.lrr': did you mean optim.lr?"
    path.write_text("optim: {lr: -1}\ntrain: {steps: 1}\n")
    assert "out of range" in refusal(config_file=path)
    path.write_text("- a list\n")
    assert "is no mapping of settings" in refusal(config_file=path)
    path.write_text("optim: {lr: 0.1\n")
    assert str(path) in refusal(config_file=path)
    path.write_text("train: {steps: 1}\n")
    assert "groups are not used with --config" in refusal("optim=adamw", config_file=path)


def test_a_folder_of_the_users_own_adds_to_the_groups(tmp_path: Path) -> None:
    experiment = tmp_path / "experiment" / "mine.yaml"
    experiment.parent.mkdir()
    experiment.write_text(
        "# @package _global_\ndefaults:\n  - override /optim: adamw\n"
        "train: {epochs: 3}\nmodel: {factory: my.net:build}\n"
    )
    composed = compose(["experiment=mine"], config_dir=tmp_path, explain=True)
    config = composed.config
    assert (config.experiment, config.train.epochs, config.optim.name) == ("mine", 3, "adamw")
    assert config.model.factory == "my.net:build"
    assert composed.origins["train.epochs"] == str(experiment)
    assert run_dir_of(config).name.startswith("mine-")
    assert "did you mean mine?" in refusal("experiment=mime", config_dir=tmp_path)
    experiment.write_text("# @package _global_\ntrain: {epoch: 3}\n")
    wrong = refusal("experiment=mine", config_dir=tmp_path)
    assert wrong == "unknown key 'train.epoch': did you mean train.epochs?"


@pytest.mark.parametrize(
    "value", ["${oc.env:API_KEY}", "${now:%H}", "a-${oc.env:API_KEY,none}", "${oc.decode:1}"]
)
def test_interpolation_of_the_surroundings_is_refused(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", SECRET)
    told = refusal(f"data.root='{value}'")
    assert "run_dir=$VALUE" in refusal(f"run_dir='{value}'")
    assert "Let the shell fill it in: data.root=$VALUE" in told
    assert SECRET not in told
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.yaml").write_text(f'name: image_folder\nroot: "{value}"\n')
    assert "data.root=$VALUE" in refusal("data=mine", config_dir=tmp_path)
    (folder / "mine.yaml").write_text(f'# @package _global_\nrun_dir: "{value}"\n')
    assert "run_dir=$VALUE" in refusal("data=mine", config_dir=tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(f'train: {{steps: 1}}\nmodel: {{args: {{deep: ["{value}"]}}}}\n')
    assert "model.args.deep" in refusal(config_file=path)


def test_interpolation_of_another_key_is_allowed() -> None:
    assert (
        compose(["optim.warmup_steps=${log_every}", "log_every=7"]).config
        == compose(["optim.warmup_steps=7", "log_every=7"]).config
    )
    assert "'nothing'" in refusal("optim.lr=${nothing}")


@pytest.mark.slow
def test_secrets_of_the_environment_stay_out_of_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    run_ranks(_train_with_secrets, 1, small(tmp_path, "train.steps=2"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "summary.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def _train_with_secrets(config: Config) -> None:
    import os

    from dist_train.train import train

    os.environ |= dict.fromkeys(("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"), SECRET)
    train(config)


def test_a_factorys_arguments_need_no_plus() -> None:
    one_by_one = compose(["model.args.width=8", "model.args.deep.er=x"]).config
    assert one_by_one.model.args == {"width": 8, "deep": {"er": "x"}}
    assert compose(["model.args={width: 8, deep: {er: x}}"]).config == one_by_one


def test_composing_imports_no_torch() -> None:
    code = (
        "import sys, dist_train.config.arguments as a; a.parse([]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    numbers = {key for key, hint in leaves(Config) if re.search(r"\b(int|float)\b", str(hint))}
    elsewhere = {"data.mean", "data.std", "optim.betas", "profile.steps", "profile.ranks"}
    hints = dict(leaves(Config))
    assert {key for key in numbers if get_origin(hints[key]) is not Literal} == {
        *RANGES,
        *elsewhere,
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.global_batch_size=0", "it must be at least 1"),
        ("train.max_minutes=0", "it must be above 0"),
        ("optim.momentum=1", "it must be at most 0.9999"),
        ("optim.lr=nan", "optim.lr=nan is out of range: it must be a finite number"),
        ("optim.lr=inf", "optim.lr=inf is out of range: it must be a finite number"),
        ("experiment=null", "experiment=null does not exist: choose one of"),
        ("data.val_fraction=-0.1", "it must be at least 0"),
        ("train.epochs=null", "give train.epochs=N or train.steps=N"),
        ("optim.betas=[0.9,1]", "both must be in [0, 1)"),
        ("optim.momentum=0", "raise optim.momentum above 0"),
        ("data.mean=[0.5]", "data.mean and data.std go together"),
        ("profile.steps=[9,3]", "give [first, last] with first < last"),
    ],
)
def test_rules_of_single_and_of_several_values(override: str, told: str) -> None:
    assert told in refusal(override)


def test_rules_between_keys() -> None:
    for changed, told in (
        ({"train": TrainConfig(epochs=1, early_stop_patience=2)}, "data.val_fraction=0.1"),
        ({"data": DataConfig(randaugment=True, loader="memory")}, "data.loader=workers"),
        ({"data": DataConfig(mean=(0.5,), std=(0.5, 0.5))}, "give as many"),
        ({"data": DataConfig(mean=(0.5,), std=(0.0,))}, "every value must be above 0"),
        (
            {
                "train": TrainConfig(epochs=1, micro_batch_size="auto"),
                "parallel": ParallelConfig(sync_batchnorm=True),
            },
            "give a number",
        ),
    ):
        data = DataConfig(val_fraction=0)
        with pytest.raises(ConfigError) as raised:
            check(dataclasses.replace(TRAINABLE, **({"data": data} | changed)))
        assert told in str(raised.value)


def test_the_world_may_not_be_larger_than_the_batch() -> None:
    config = Config(train=TrainConfig(global_batch_size=6))
    check_world(config, 6)
    with pytest.raises(ConfigError, match=r"6 is smaller than world_size \(= 8\)"):
        check_world(config, 8)


def test_ranks_without_as_many_micro_batches_are_refused_with_sync_batchnorm() -> None:
    def config(micro_batch_size: int | None, *, sync: bool = True) -> Config:
        train = TrainConfig(epochs=1, global_batch_size=1000, micro_batch_size=micro_batch_size)
        return Config(train=train, parallel=ParallelConfig(sync_batchnorm=sync))

    with pytest.raises(ConfigError) as raised:  # 334, 333 and 333 samples: 2, 1 and 1 pieces
        check_world(config(333), 3)
    assert "333 or 334 of 1000 samples" in str(raised.value)
    assert "1 or 2 micro-batches of train.micro_batch_size=333" in str(raised.value)
    assert "set train.micro_batch_size=334, or a train.global_batch_size" in str(raised.value)
    for fits in (334, 332, 1000, None):
        check_world(config(fits), 3)
    check_world(config(333, sync=False), 3)
    check_world(config(250), 4)


def test_sync_batchnorm_is_refused_exactly_where_pieces_differ_and_the_cure_is_one() -> None:
    for num_samples, world_size in product(range(5, 60), (2, 3, 5)):
        parts = [share(num_samples, rank, world_size) for rank in range(world_size)]
        for size in range(1, num_samples + 2):
            train = TrainConfig(epochs=1, micro_batch_size=size)
            config = Config(train=train, parallel=ParallelConfig(sync_batchnorm=True))
            mended = size
            try:
                check_pieces(config, num_samples, world_size, cure="")
            except ConfigError as refused:
                assert len({len(micro_batches(b - a, size)) for a, b in parts}) > 1
                found = re.search(r"set train\.micro_batch_size=(\d+)", str(refused))
                assert found is not None
                mended = int(found[1])
            assert len({len(micro_batches(b - a, mended)) for a, b in parts}) == 1


@pytest.mark.parametrize("text", [ODD, "", " ", "\\", "a\\b", "a\\\\", 'a\\"', "a\\'", "1", "null"])
def test_quoted_text_is_this_text_to_the_grammar(text: str) -> None:
    assert parse_override(f"run_dir={quoted(text)}").value() == text
    assert parse_override(f"run_dir=[{quoted(text)}]").value() == [text]
    name = compose([f"tracking.wandb.name={quoted(text)}"]).config.tracking.wandb.name
    assert name == text


@pytest.mark.parametrize("value", ["/data/B\u00fccher", " \u65e5\u672c/u\u0308 2 ", "C:/\u00fc"])
def test_letters_beyond_ascii_need_no_quotes(value: str) -> None:
    assert compose([f"data.root={value}"]).config.data.root == value.strip()
    args = compose([f"model.args.name={value}"]).config.model.args
    assert args["name"] == value.strip()


@pytest.mark.parametrize(
    "line",
    ["a", "a b", "1", "1.5e3", "null", "True", "a:b", "[a,b]", "{a:1}", "a,b", "range(3)", "a\\,b"],
)
def test_what_the_grammar_takes_stays_what_it_is(line: str) -> None:
    ours, theirs = parse_override(f"key={line}"), OverridesParser.create().parse_override
    assert ours.value() == theirs(f"key={line}").value()
    assert ours.input_line == f"key={line}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("data.root=/data/a=b", """into quotes: 'data.root="/data/a=b"'"""),
        ("data.root=/data (2)/\u00fc", """into quotes: 'data.root="/data (2)/\u00fc"'"""),
        ("run_dir=runs/\u00fc seed=3", """into quotes: 'run_dir="runs/\u00fc seed=3"'"""),
    ],
)
def test_text_that_needs_quotes_is_shown_with_them(line: str, told: str) -> None:
    assert refusal(line).endswith(told)


@pytest.mark.parametrize(
    "line", ["optim.lr", "data.mean=[0.1,0.2", "data.root='a", "=3)", "a b=(c"]
)
def test_what_quotes_would_not_mend_is_not_shown_in_quotes(line: str) -> None:
    assert refusal(line).endswith("is no override: write key=value, like optim.lr=0.1")


@pytest.mark.parametrize("line", ["model=+0.6\n", "run_dir=a\nb", "run_dir=\x1b[1mbold"])
def test_a_line_that_cannot_be_shown_as_it_is_has_an_answer_of_one_line(line: str) -> None:
    said = refusal(line)
    assert said.isprintable(), repr(said)
    assert said.endswith("on one line and without control characters")


def test_an_installation_and_own_groups_may_be_in_any_folder(tmp_path: Path) -> None:
    home, own = tmp_path / ODD, tmp_path / f"own {ODD}"
    for name in ("dist_train", "configs"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    (own / "optim").mkdir(parents=True)
    (own / "optim" / "mine.yaml").write_text("name: adamw\n")
    for words in ([], ["--config-dir", str(own), "optim=mine"]):
        done = subprocess.run(
            [sys.executable, "-m", "dist_train", "--print-config", *words],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (f"{own}/optim/mine.yaml" in done.stdout) == bool(words)
        assert f"{home}/configs/experiment/cifar10_resnet9.yaml" in done.stdout


def test_a_mapping_given_whole_replaces_what_a_group_set() -> None:
    assert compose(["experiment=quickstart"]).config.model.args == {"width": 16}
    assert compose(["experiment=quickstart", "model.args={}"]).config.model.args == {}
    both = compose(["experiment=quickstart", "model.args={a:1}", "model.args.b=2"])
    assert both.config.model.args == {"a": 1, "b": 2}
