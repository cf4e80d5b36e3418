"""No secret is in what a run writes, and a run goes on without it in its folder."""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import Config, ConfigError
from dist_train.config.arguments import parse
from dist_train.config.compose import compose, describe, to_yaml
from dist_train.config.identity import check_same_run, config_hash
from dist_train.config.redact import MASK, is_secret, mask, redact, redact_words
from tests.ranks import run_ranks, start_ranks_of
from tests.settings import SMALL, small

NET = "model.factory=tests.test_redact:net_with_key"


def net_with_key(num_classes: int, *, api_key: str = "", tells: str = "") -> Any:
    """Return a network that fails, when it is made or in a later step, and tells every secret."""
    from tests.nets import plain_net

    def tell() -> None:
        raise RuntimeError(f"no answer to {api_key}\nwith {os.environ['X_TOKEN']}")

    if tells == "at the start":
        tell()
    net = plain_net(num_classes)
    calls = itertools.count()
    if tells == "later":
        net.register_forward_hook(lambda *_: tell() if next(calls) == 10 else None)
    return net


def trained(folder: Path, words: list[str], env: dict[str, str]) -> None:
    from dist_train.train import train

    os.environ.update(env)
    sys.argv = ["dist_train", *words]
    train(small(folder / "run", *words))


def files_with(folder: Path, *secrets: str) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 3
    return [f"{f}: {s}" for f in files for s in secrets if s.encode() in f.read_bytes()]


@pytest.mark.parametrize(
    "key",
    [
        "model.args.api_key",
        "password",
        "DB_PASSWORD",
        "PGPASSWORD",
        "HF_TOKEN",
        "clientSecret",
        "--access-key",
        "AWS_SECRET_ACCESS_KEY",
        "credentials",
        "MYSQL_PWD",
    ],
)
def test_keys_that_hold_secrets_are_known(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["num_tokens", "tokenizer", "token_type", "PWD", "OLDPWD", "key", "api_key_file", "keys", ""],
)
def test_keys_that_hold_none_are_left_alone(key: str) -> None:
    assert not is_secret(key)


def test_no_setting_of_the_schema_is_taken_for_a_secret() -> None:
    text = to_yaml(Config())
    assert MASK not in text


def test_urls_lose_their_password_and_keep_their_host() -> None:
    assert mask("https://me:pass@host/data") == f"https://me:{MASK}@host/data"
    assert mask("s3://bucket/data@v1") == "s3://bucket/data@v1"
    assert redact("GET http://h/x?token=abc&n=1") == f"GET http://h/x?token={MASK}&n=1"


def test_masking_twice_is_masking_once() -> None:
    values = {"url": "https://me:pass@host", "args": {"password": "a", "width": 3}}
    assert redact(redact(values)) == redact(values)


def test_numbers_and_switches_are_no_tokens_but_may_be_passwords() -> None:
    values = {"class_token": True, "pad_token": 7, "password": 1234, "api_key": None}
    assert mask(values) == values | {"password": MASK}


def test_a_command_line_loses_its_secrets() -> None:
    words = ["run", "model.args.api_key=abc", "--api-key", "abc", "++model.args={password: abc}"]
    words += ["data.root=https://me:abc@host", "optim.lr=0.1"]
    shown = redact_words(words)
    assert not [word for word in shown if "abc" in word]
    assert (shown[0], shown[-1]) == ("run", "optim.lr=0.1")
    assert len(shown) == len(words)


def test_values_of_secret_variables_are_found_in_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", 'quoted"canary')
    monkeypatch.setenv("SOME_URL", "https://me:canaryword@host/")
    monkeypatch.setenv("SOME_PASSWORD", "short")
    text = 'a quoted"canary, canaryword, {}, and a short word'.format(json.dumps('quoted"canary'))
    assert redact(text) == f'a {MASK}, {MASK}, "{MASK}", and a short word'


def test_a_redacted_setting_is_no_changed_setting(tmp_path: Path) -> None:
    first = small(tmp_path, NET, "model.args.api_key=canary-one")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(first))
    saved = compose([], config_file=path).config
    assert saved.model.args["api_key"] == MASK
    check_same_run(first, saved, tmp_path)
    other = small(tmp_path, NET, "model.args.api_key=canary-two")
    check_same_run(other, saved, tmp_path)  # a renewed key is the same run
    assert config_hash(first) == config_hash(other)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        check_same_run(small(tmp_path, NET, "seed=9"), saved, tmp_path)


def test_a_redacted_setting_is_not_trained_with(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small(tmp_path, NET, "model.args.api_key=canary-one")))
    with pytest.raises(ConfigError, match=r"model\.args\.api_key=VALUE"):
        parse(["--config", str(path)])
    again = parse(["--config", str(path), "model.args.api_key=canary-one"]).config
    assert again.model.args["api_key"] == "canary-one"


def test_print_config_shows_no_secret() -> None:
    text = describe(compose([*SMALL, "model.args.api_key=canary-one"], explain=True))
    assert "canary-one" not in text
    assert MASK in text


def test_no_file_of_a_run_holds_a_secret_and_it_resumes(tmp_path: Path) -> None:
    words = [
        NET,
        "model.args.api_key=canary-key",
        "tracking.wandb.project=https://me:canary-url@host/data",
    ]
    env = {"X_TOKEN": "canary-token"}
    run_ranks(trained, 1, tmp_path, [*words, "train.steps=2"], env)
    run_ranks(trained, 1, tmp_path, [*words, "train.steps=4"], env)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 4
    assert not files_with(tmp_path / "run", "canary-")
    assert MASK in (tmp_path / "run" / "config.yaml").read_text()
    assert f"model.args.api_key={MASK}" in (tmp_path / "run" / "environment.json").read_text()


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_no_secret_of_an_exception_is_in_a_file(when: str, tmp_path: Path) -> None:
    words = [NET, "model.args.api_key=canary-key", f"model.args.tells='{when}'"]
    ends = start_ranks_of(trained, 0, tmp_path, words, {"X_TOKEN": "canary-token"})
    assert "canary-token" in str(ends[0].error)
    run = tmp_path / "run"
    assert not files_with(run, "canary-")
    later = ("chain.json", "log/failure-0-rank0.txt") if when == "later" else ()
    for name in ("status.json", "events.jsonl", *later):
        assert MASK in (run / name).read_text(), name
