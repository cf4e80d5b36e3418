"""Rows X2 and X6: names that lead out of the run's folder, and random settings and manifests."""

import time
from pathlib import Path

from benchmarks.reliability.row import Row, Trial, check
from dist_train.checkpoint import write_checkpoint
from dist_train.checkpoint_folder import BadCheckpointError, newest_good, read_verified
from dist_train.config import ConfigError
from tests.settings import small
from tests.spoilt_checkpoints import SPOILS
from tests.storage_faults import STATE

OUTWARD = tuple(how for how in SPOILS if "path" in how or "link" in how or "torch.dist" in how)
FUZZ_SEC, SMALL_FUZZ_SEC = 600.0, 5.0
KEYS = ("optim.lr", "train.steps", "data.args", "model.factory", "run_dir", "seed", "eval", "tags")
KEYS += ("model.args", "model.args.x", "~model.args.width", "data.root", "resume", "experiment")
KEYS += ("model", "tracking.wandb", "tracking.wandb.name", "batch_size", "--lr")
PIECES = ("=", "+", "~", "{", "}", "[", "]", "${", "oc.env:HOME", "null", "'", '"', "\\", ",", "..")
PIECES += ("~/", "~x/", "none", "2026_11_30", "true", "quickstart", "resnet18_cifar", ".", "@")
PIECES += ("1e999", "-1", "nan", "0x", "\u2028", "\0", "!!python/object:os", "&a", "*a", ":", " ")


def x2(trial: Trial) -> float | None:
    """A checkpoint or a name that points elsewhere; nothing there may be read or written."""
    begin = time.monotonic()
    root = trial.folder / "root"
    if trial.one_of(("checkpoint", "settings")) == "checkpoint":
        how = OUTWARD[trial.seed // 2 % len(OUTWARD)]
        trial.notes["how"] = how
        folder = root / "checkpoints"
        folder.mkdir(parents=True)
        older = write_checkpoint(folder, STATE, step=9)
        newer = write_checkpoint(folder, {**STATE, "n": 4}, step=10)
        before = _contents(trial.folder)
        wanted = SPOILS[how](newer, older)
        spoilt = _contents(trial.folder)
        trial.fired = before != spoilt
        told: list[str] = []
        found = newest_good(folder, told.append)
        check(found == (older, read_verified(older)), f"took {found and found[0]}")
        check(len(told) == 1 and wanted in told[0], f"told {told}")
        check(_contents(trial.folder) == spoilt, "something was written")
        return time.monotonic() - begin
    root.mkdir()
    outside = trial.folder / "out.yaml"
    outside.write_text("# @package _global_\nseed: 7777\n")
    name = trial.dice.choice(
        (
            str(outside),
            str(outside.with_suffix("")),
            f"{'../' * 20}{outside.relative_to('/').with_suffix('')}",
            f"cifar10_tutorial/../{'../' * 20}{outside.relative_to('/').with_suffix('')}",
        )
    )
    before = _contents(trial.folder)
    trial.fired = True
    try:
        read = small(root / "run", f"experiment={name}").seed == 7777
        check(not read, "a file outside of the folders of settings was read")
    except ConfigError as error:
        check("\n" not in str(error), "the message has several lines")
    check(_contents(trial.folder) == before, "something was written")
    return time.monotonic() - begin


def _contents(folder: Path) -> set[tuple[str, int, int]]:
    return {
        (str(p), p.lstat().st_mode, p.lstat().st_size) for p in folder.rglob("*") if not p.is_dir()
    }


def x6(trial: Trial) -> float | None:
    """Random command lines and random manifests until the time is over."""
    minutes = trial.options.minutes
    end = time.monotonic() + (FUZZ_SEC if minutes is None else 60 * minutes)
    folder = trial.folder / "checkpoints"
    folder.mkdir()
    older = write_checkpoint(folder, STATE, step=9)
    newer = write_checkpoint(folder, STATE, step=10)
    whole = (newer / "manifest.json").read_bytes()
    refused = {"settings": 0, "manifests": 0, "accepted": 0}
    slowest, counted = 0.0, 0
    while time.monotonic() < end:
        counted += 1
        begin = time.monotonic()
        word = _random_word(trial)
        try:
            small(trial.folder / "run", word)
            refused["accepted"] += 1
        except ConfigError as error:
            refused["settings"] += 1
            check("\n" not in str(error), f"{word!r}: several lines")
        except Exception as error:
            check(False, f"setting {word!r} ends in {type(error).__name__}: {error}")
        data = _random_manifest(trial, whole)
        (newer / "manifest.json").write_bytes(data)
        told: list[str] = []
        try:
            found = newest_good(folder, told.append)
        except BadCheckpointError as bad:
            check(False, f"the older one was not taken: {bad}")
        except Exception as error:
            check(False, f"manifest {data[:120]!r} ends in {type(error).__name__}: {error}")
        else:
            if data != whole:
                check(found is not None and found[0] == older, f"believed {data[:200]!r}")
                check(len(told) == 1 and "\n" not in told[0], f"told {told}")
                refused["manifests"] += 1
        slowest = max(slowest, time.monotonic() - begin)
    trial.fired = refused["settings"] > 0 and refused["manifests"] > 0
    trial.faults = counted * 2
    trial.notes |= refused | {"slowest_sec": round(slowest, 2)}
    check(slowest < 10.0, f"one took {slowest:.1f} s")
    return slowest


def _random_word(trial: Trial) -> str:
    dice = trial.dice
    key = dice.choice(KEYS)
    if dice.random() < 0.2:
        at = dice.randrange(len(key))
        key = key[:at] + dice.choice(PIECES) + key[at + 1 :]
    text = "".join(
        dice.choice((dice.choice(PIECES), chr(dice.randrange(1, 0x250)), str(dice.random())))
        for _ in range(dice.randrange(6))
    )
    return f"{key}={text}" if dice.random() < 0.9 else key + text


def _random_manifest(trial: Trial, whole: bytes) -> bytes:
    dice, data = trial.dice, bytearray(whole)
    for _ in range(dice.randrange(1, 9)):
        place = dice.randrange(len(data) + 1)
        how = dice.randrange(4)
        if how == 0:
            del data[place : place + dice.randrange(1, 40)]
        elif how == 1:
            data[place:place] = dice.randbytes(dice.randrange(1, 20))
        elif how == 2:
            data[place:place] = dice.choice((b"[" * 500, b"9" * 500, b"\xff\xfe", b'"\\ud800"'))
        else:
            data[place : place + 1] = bytes([dice.randrange(256)])
    return bytes(data) or b"0"


ROWS = (
    Row(
        id="X2",
        promise="no path in a name, link or manifest leads out of the run's folder",
        injection="path traversal, symbolic links, absolute paths in checkpoints; settings "
        "from other folders",
        num_trials=40,
        measures="the refusal",
        work=x2,
        small=8,
    ),
    Row(
        id="X6",
        promise="random settings and random checkpoint headers end in one line, never in a crash "
        "or hang",
        injection="fuzzed settings and manifests for ten minutes",
        num_trials=1,
        measures="the slowest one",
        work=x6,
        small_minutes=SMALL_FUZZ_SEC / 60,
        limit_sec=700.0,
    ),
)
