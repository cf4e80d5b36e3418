"""What people type who know other tools is answered with the setting that there is here."""

from typing import Any

import pytest

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import instead_of, parse
from dist_train.config.compose import compose
from dist_train.config.importing import as_import_path, import_callable
from dist_train.config.synonyms import OPTIONS, SETTINGS
from dist_train.config.typed import leaves, unknown_key
from dist_train.config.value_synonyms import VALUES
from launch.local import _parse

KEYS = dict(leaves(Config))


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as raised:
        compose([*words])
    return str(raised.value)


@pytest.mark.parametrize("typed", SETTINGS)
def test_what_is_hinted_is_a_setting(typed: str) -> None:
    setting, _, remark = SETTINGS[typed].partition(" ")
    key, equals, value = setting.partition("=")
    assert key in KEYS or key == "experiment" or key.startswith("model.args.")
    assert typed not in KEYS, "no hint would ever be given"
    told = unknown_key(typed)
    assert told.startswith(f"unknown key {typed!r}: did you mean {setting}?")
    assert remark in told
    if equals and "." in key and value != "package.module:callable":
        compose([setting])


def test_what_is_written_with_other_signs_is_found_too() -> None:
    for typed in ("Batch-Size", "BATCH_SIZE", "training.batch_size", "+batch_size"):
        assert "did you mean train.global_batch_size?" in unknown_key(typed)


@pytest.mark.parametrize("typed", OPTIONS)
def test_what_is_an_option_is_named(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed not in KEYS
    assert typed not in SETTINGS
    assert f"dist-train run {OPTIONS[typed]}" in unknown_key(typed)
    with pytest.raises(SystemExit):
        _parse(["--help"])
    assert f"{OPTIONS[typed]} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--experiment quickstart", "settings are written experiment=quickstart"),
        ("--lr 0.1", "settings are written optim.lr=0.1"),
        ("--lr=0.1", "settings are written optim.lr=0.1"),
        ("-lr 0.1", "settings are written optim.lr=0.1"),
        ("--optim.lr 0.1", "settings are written optim.lr=0.1"),
        ("--model resnet18_cifar", "settings are written model=resnet18_cifar"),
        ("--batch-size 64", "settings are written train.global_batch_size=64 (of all ranks"),
        ("--epochs", "settings are written train.epochs=VALUE"),
        ("--epochs optim.lr=3", "settings are written train.epochs=VALUE"),
        ("--wandb", "settings are written tracking.wandb.mode=auto"),
        ("--dryrun", "did you mean --dry-run?"),
        ("--nothing", "see --help"),
    ],
)
def test_settings_with_dashes(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(words.split())
    assert str(raised.value).startswith(f"unrecognized arguments: {words.split()[0]}")
    assert told in str(raised.value)


def test_options_of_other_launchers() -> None:
    options = ["--nproc", "--nnodes"]
    for word in ("--gpus", "--nproc-per-node=2", "--nproc_per_node", "--num-processes", "--nporc"):
        assert instead_of(word, (word,), options) == "did you mean --nproc?"
    assert instead_of("--gpus", ("--gpus",), ["--gpus-per-node"]) is None


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("tracking.wandb=true", "did you mean tracking.wandb.mode=auto?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("optim.epochs=3", "did you mean train.epochs?"),
        ("train.epoch=3", "did you mean train.epochs?"),
        ("train=3", "it is a group of settings: train.epochs, train.steps"),
        ("guards={lag: 1}", "it is a group of settings: guards."),
        ("quickstart", "write experiment=quickstart"),
        ("resnet18_cifar", "write model=resnet18_cifar"),
    ],
)
def test_words_that_are_nearly_settings(word: str, told: str) -> None:
    assert told in refusal(word)


@pytest.mark.parametrize(("key", "typed"), [(k, word) for k in VALUES for word in VALUES[k]])
def test_what_values_are_called_elsewhere(key: str, typed: str) -> None:
    meant, _, remark = VALUES[key][typed].partition(" ")
    told = refusal(f"{key}={typed}")
    assert told.startswith(f"{key}={typed.title() if typed in ('true', 'false') else typed} ")
    assert told.endswith(f"; did you mean {key}={meant}?" + (f" ({remark})" if remark else ""))
    compose([f"{key}={meant}"])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.name=adm", "; did you mean optim.name=adamw?"),
        ("optim.name=SGD", "; did you mean optim.name=sgd?"),
        ("precision=fp32x", "; did you mean precision=fp32?"),
        ("precision=int8", "is not a choice: choose one of auto, fp32, bf16, fp16"),
        ("~model.args.depth", "takes 'depth' out of model.args, which holds only width: leave"),
        ("model.args={} ~model.args.width", "which holds nothing at all: leave ~model.args.width"),
    ],
)
def test_values_that_are_nearly_right(word: str, told: str) -> None:
    assert told in refusal(*word.split())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("mine.grey", "mine:grey"),
        ("torchvision.datasets.MNIST", "torchvision.datasets:MNIST"),
        ("mine.py:grey", "mine:grey"),
        ("./pkg/mine.py:grey", "pkg.mine:grey"),
        ("mine", None),
        ("/data/cats", None),
        ("mine:", None),
    ],
)
def test_an_import_path_that_is_written_otherwise(typed: str, meant: str | None) -> None:
    assert as_import_path(typed) == meant
    for name, use in (
        ("data.name", lambda: compose([f"data.name={typed}"])),
        ("model.factory", lambda: import_callable(typed, "model.factory")),
    ):
        with pytest.raises(ConfigError) as raised:
            use()
        assert (f"did you mean {name}={meant}?" in str(raised.value)) == (meant is not None)


def test_a_table_of_one_word_each() -> None:
    everything: dict[str, Any] = {**SETTINGS, **OPTIONS}
    assert len(everything) == len(SETTINGS) + len(OPTIONS)
    assert all(word == word.lower() and "-" not in word for word in everything)
