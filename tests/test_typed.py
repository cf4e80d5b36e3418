"""Plain values become the schema's types, or the key that does not fit is named."""

from typing import Any

import pytest

from dist_train.config import Config, ConfigError, TrainConfig
from dist_train.config.typed import build, did_you_mean, flatten, leaves, plain

TRAINABLE = Config(train=TrainConfig(epochs=1))


def test_the_schema_survives_yaml_and_back() -> None:
    assert build(Config, plain(TRAINABLE)) == TRAINABLE
    assert [key for key, _ in leaves(Config)] == list(flatten(Config()))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seed": "x"}, "seed=x has the wrong type: it must be a whole number"),
        ({"seed": 1.5}, "seed=1.5 has the wrong type: it must be a whole number"),
        ({"seed": True}, "seed=True has the wrong type: it must be a whole number"),
        ({"seed": None}, "seed=null has the wrong type: it must be a whole number"),
        ({"deterministic": 1}, "deterministic=1 has the wrong type: it must be true or false"),
        ({"optim": {"lr": "big"}}, "optim.lr=big has the wrong type: it must be a number"),
        ({"optim": {"betas": [1]}}, "optim.betas=[1] has the wrong type: it must be a list of 2"),
        ({"optim": {"betas": 0.9}}, "it must be a list like optim.betas=[...]"),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas[1]=x has the wrong type"),
        ({"optim": 3}, "optim is a group of settings, not 3: set optim.<name>=..."),
        ({"model": {"args": 3}}, "it must be a mapping: set model.args.<name>=..."),
        ({"device": "gpu"}, "device=gpu is not a choice: choose one of auto, cpu, cuda"),
        ({"device": "cdua"}, "device=cdua is not a choice: choose one of auto, cpu, cuda"),
        ({"run_dir": [1]}, "run_dir=[1] has the wrong type: it must be text"),
        ({"trian": {}}, "unknown key 'trian'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build(Config, values)
    assert told in str(raised.value)


def test_values_that_mean_the_same_are_the_same() -> None:
    as_typed = {"seed": 3.0, "optim": {"lr": 1}, "experiment": 5, "train": {"steps": None}}
    config = build(Config, as_typed)
    assert (config.seed, config.optim.lr, config.experiment) == (3, 1.0, "5")
    assert isinstance(config.seed, int)
    assert isinstance(config.optim.lr, float)


def test_the_nearest_choice() -> None:
    keys = [key for key, _ in leaves(Config)]
    assert did_you_mean("lr", keys) == ": did you mean optim.lr?"
    assert did_you_mean("model.lr", keys) == ": did you mean optim.lr?"
    assert did_you_mean("zzz", keys) == ""
    assert did_you_mean("zzz", ["a", "b"]) == ": choose one of a, b"
