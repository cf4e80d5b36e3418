"""An experiment's own settings do not leak, and mappings can be changed, reset and taken apart."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from dist_train.config import Config, ConfigError
from dist_train.config.compose import compose
from dist_train.config.identity import BUNDLED, name_of, run_dir_of

CONFIGS = Path(__file__).parents[1] / "configs"
MINE = "mine:net"


def config(*words: str, **options: Any) -> Config:
    return compose([*words], **options).config


@pytest.mark.parametrize("experiment", ["quickstart", "cifar10_resnet9", "cifar10_speed"])
def test_another_factory_comes_without_the_arguments_of_the_first(experiment: str) -> None:
    first = config(f"experiment={experiment}").model
    assert first.args
    words = (f"experiment={experiment}", f"model.factory={MINE}")
    assert config(*words).model.args == {}
    assert config(*words, "model.args.depth=3").model.args == {"depth": 3}
    assert config("model.args.depth=3", *words).model.args == {"depth": 3}
    same = config(f"experiment={experiment}", f"model.factory={first.factory}", "model.args.x=1")
    assert same.model.args == {**first.args, "x": 1}
    assert config("experiment=quickstart", "model=wide_resnet").model.args == {}
    assert config("experiment=quickstart", "model=resnet9").model.args == {"width": 16}


def test_a_users_files_keep_their_own_arguments_only(tmp_path: Path) -> None:
    for name, text in {
        "experiment/bare": "model: {factory: 'mine:net'}\ntrain: {epochs: 1}\n",
        "experiment/full": "model: {factory: 'mine:net', args: {depth: 2}}\ntrain: {epochs: 1}\n",
        "experiment/more": "# @package _global_\ndefaults: [full, _self_]\nmodel: {args: {b: 1}}\n",
        "experiment/wider": "train: {epochs: 1}\nmodel: {args: {width: 64}}\n",
        "model/own": "factory: mine:net\nargs: {depth: 4}\n",
        "data/own": "name: mine:data\nargs: {num: 4}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)

    def args(*words: str) -> dict[str, Any]:
        return config(*words, config_dir=tmp_path).model.args

    assert args("experiment=bare") == {}
    assert args("experiment=full") == {"depth": 2}
    assert args("experiment=full", "model.args.width=3") == {"depth": 2, "width": 3}
    assert args("experiment=more") == {"depth": 2, "b": 1}
    assert args("experiment=wider") == {"width": 64}
    assert args("model=own") == {"depth": 4}
    assert args("experiment=quickstart", "model=own") == {"depth": 4}
    assert args("experiment=full", "model.factory=other:net") == {}
    assert args("experiment=wider", "model.factory=other:net") == {"width": 64}
    for words in (("experiment=full", "model=own"), ("model=own", "experiment=full")):
        made = config(*words, config_dir=tmp_path)
        assert (made.model.args, made.train.epochs) == ({"depth": 4}, 1), "the group's"
    other = config("experiment=full", "model=wide_resnet", config_dir=tmp_path).model
    assert (other.factory, other.args) == ("dist_train.models:wide_resnet", {})
    data = config("data=own", "data.name=other:data", config_dir=tmp_path).data
    assert data.args == {}


def test_a_runs_file_keeps_its_arguments_for_its_own_factory(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 1}\nmodel: {factory: 'a:b', args: {x: 1}}\n")
    assert config(config_file=path).model.args == {"x": 1}
    assert config("model.args.y=2", config_file=path).model.args == {"x": 1, "y": 2}
    assert config("model.factory=c:d", config_file=path).model.args == {}


def test_a_file_that_names_no_factory_gives_its_arguments_to_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 1}\nmodel: {args: {x: 1}}\ndata: {args: {n: 2}}\n")
    words = ("model.factory=c:d", "data.name=c:e")
    made = config(*words, config_file=path)
    assert (made.model.args, made.data.args) == ({"x": 1}, {"n": 2})
    assert config(*words, "model.args.y=2", config_file=path).model.args == {"x": 1, "y": 2}
    assert config("model.args={y: 2}", *words, config_file=path).model.args == {"y": 2}


def test_an_experiment_of_the_users_own_needs_no_package(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    text = "defaults:\n  - override /optim: adamw\ntrain: {epochs: 3}\noptim: {lr: 0.5}\n"
    found = []
    for head in ("", "# @package _global_\n", "# my experiment\n"):
        (folder / "mine.yaml").write_text(head + text)
        composed = compose(
            ["experiment=mine", "optim.momentum=0.5"], config_dir=tmp_path, explain=True
        )
        assert composed.origins["optim.lr"] == str(folder / "mine.yaml")
        assert compose(["experiment=mine", "optim.lr=3"], config_dir=tmp_path).config.optim.lr == 3
        found.append(composed.config)
    assert found[0] == found[1] == found[2]
    assert (found[0].experiment, found[0].train.epochs, found[0].optim.name) == ("mine", 3, "adamw")
    (folder / "mine.yaml").write_text("trian: {epochs: 3}\n")
    with pytest.raises(ConfigError, match="unknown key 'trian'"):
        compose(["experiment=mine"], config_dir=tmp_path)


def test_no_experiment_at_all() -> None:
    for word in ("experiment=none", "~experiment"):
        bare = config(word, "train.steps=3")
        assert (bare.experiment, bare.train.steps, bare.data.cutout) == ("custom", 3, 0)
        assert bare.model.args == {"width": 32}, "of the group, model=resnet9"
        with pytest.raises(ConfigError, match=r"give train\.epochs=N"):
            config(word)


def test_a_mapping_is_reset_and_taken_apart() -> None:
    quick = "experiment=quickstart"
    assert config(quick, "~model.args.width").model.args == {}
    assert config(quick, "~model.args").model.args == {}
    assert config(quick, "model.args=null").model.args == {}
    assert config(quick, "model.args={}", "model.args.a.b=1").model.args == {"a": {"b": 1}}
    assert config(quick, "model.args.a={b: 1, c: 2}", "~model.args.a.b").model.args == {
        "width": 16,
        "a": {"c": 2},
    }
    with pytest.raises(ConfigError, match=r"model\.args\.depth takes .* holds only width"):
        config(quick, "~model.args.depth")
    with pytest.raises(ConfigError, match=r"cannot be: write optim\.lr=VALUE"):
        config("~optim.lr")
    with pytest.raises(ConfigError, match="is no override: write key=value"):
        config("model.args.=3")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("data.name=mine:stripes", "mine_stripes"),
        ("data.name=torchvision.datasets:MNIST experiment=quickstart", "datasets_MNIST"),
        ("data.name=image_folder data.root=/d", "image_folder"),
        ("data.name=mine:stripes experiment=none train.steps=1", "mine_stripes"),
        ("data=cifar10 data.root=/d", "cifar10_resnet9"),
        ("data=synthetic experiment=quickstart", "quickstart"),
        ("experiment=none train.steps=1", "custom"),
    ],
)
def test_a_run_is_named_for_what_is_trained(words: str, name: str) -> None:
    made = config(*words.split())
    assert name_of(made) == name
    assert run_dir_of(made).name.startswith(f"{name}-")


def test_a_run_of_the_users_own_experiment_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "stripes_30.yaml").write_text("train: {epochs: 30}\n")
    mine = config("experiment=stripes_30", "data.name=mine:data", config_dir=tmp_path)
    assert name_of(mine) == "stripes_30"
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert name_of(config(f"data.root={tmp_path / 'data'}")) == "image_folder"
    assert sorted(BUNDLED) == sorted(path.stem for path in CONFIGS.glob("experiment/*.yaml"))


def test_a_program_with_hydra_of_its_own_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    store = ConfigStore.instance()
    store.store(name="main", node={"b": 2})
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        theirs, version = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
        compose([])
        with pytest.raises(ConfigError):
            compose(["optm.lr=1"])
        assert GlobalHydra.instance().hydra is theirs
        assert VersionBase.instance().getbase() == version
        assert hydra_compose("theirs") == {"a": 1}
        assert hydra_compose("main") == {"b": 2}
    compose([])
    assert not GlobalHydra.instance().is_initialized()
