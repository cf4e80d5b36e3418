"""The command line of a run: overrides and a few options, and how a mistake is told."""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dist_train.config.compose import compose, describe
from dist_train.config.redact import redact, refuse_redacted
from dist_train.config.schema import Config, ConfigError
from dist_train.config.streams import put
from dist_train.config.synonyms import option_for, setting_for
from dist_train.config.typed import leaves
from dist_train.config.user_code import NEXT_LINE
from dist_train.config.whole_file import read_json, write_atomically

VERDICT_VARIABLE = "DIST_TRAIN_VERDICT"  # a file through which ranks tell `dist-train run`
RUN_DIR_VARIABLE = "DIST_TRAIN_RUN_DIR"  # where `dist-train run` looks, for its torchrun
MET_FILE = "met.json"  # beside it: what the ranks have agreed on
BEGUN_FILE = "begun"  # beside it, once their first step is done: there may be something to save
NODES_VARIABLE = "DIST_TRAIN_NNODES"
GROUPS = ("model", "data", "optim")  # beside experiment
LINGER_SEC = 10.0
LINGER_SLICE_SEC = 0.05  # how often a silent rank looks whether it is asked to end


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asks for."""

    config: Config
    text: str | None = None  # to be printed instead of training
    dry_run: bool = False


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit; says what is meant."""

    _words: tuple[str, ...] = ()

    def parse_known_intermixed_args(  # type: ignore[override] # it has two forms
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse, and remember the words for the message of an error."""
        self._words = tuple(args if args is not None else sys.argv[1:])
        return super().parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> None:  # type: ignore[override] # raises instead of exiting
        begin = "unrecognized arguments: "
        if not message.startswith(begin):
            raise ConfigError(f"{message}: see --help")
        unknown = message.removeprefix(begin).split()[0]
        options = [o for action in self._actions for o in action.option_strings]
        hint = instead_of(unknown, self._words, options)
        raise ConfigError(f"{message}: {hint or 'see --help'}")


def instead_of(unknown: str, words: tuple[str, ...], options: list[str]) -> str | None:
    """Return what to write instead of an option that there is not: --lr 0.1 is optim.lr=0.1.

    Args:
        unknown: the option.
        words: all of the command line: its value may be the next one.
        options: those that there are.
    """
    option, equals, value = unknown.partition("=")
    name = option.lstrip("-").replace("-", "_")
    if not equals:
        following = words[words.index(unknown) + 1 :] if unknown in words else ()
        value = next(iter(following), "-")
        value = "VALUE" if value.startswith("-") or "=" in value else value
    meant = setting_for(name)
    known = [key for key, _ in leaves(Config)]
    near = [option_for(name), *get_close_matches(option, options, 1, 0.75)]
    near = [o for o in near if o in options]
    if name == "experiment" or (meant is None and (name in known or name in GROUPS)):
        return f"settings are written {name}={value}"
    same = [key for key in known if key.rpartition(".")[2] == name]
    if meant is None and len(same) == 1:
        meant = same[0]
    if meant is not None:
        setting, _, remark = meant.partition(" ")
        written = setting if "=" in setting else f"{setting}={value}"
        return f"settings are written {written}" + (f" ({remark})" if remark else "")
    return f"did you mean {near[0]}?" if near else None


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `python -m dist_train` and `dist-train run` share."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra's grammar")
    parser.add_argument("--config", type=_path, help="start from a run's config.yaml")
    parser.add_argument("--config-dir", type=_path, help="a folder with your own groups")
    parser.add_argument(
        "--print-config", action="store_true", help="print every setting and where it came from"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would happen; trains nothing"
    )


def _path(text: str) -> Path:
    return Path(text).expanduser()  # a shell leaves --config=~/x as it is


def words_of(options: argparse.Namespace) -> list[str]:
    """Return what a rank must be given to compose the same configuration."""
    words = list(options.overrides)
    if options.config is not None:
        words += ["--config", str(options.config)]
    if options.config_dir is not None:
        words += ["--config-dir", str(options.config_dir)]
    return words


def parse(argv: list[str]) -> Request:
    """Compose and check what `argv` asks for, without torch.

    Raises:
        ConfigError: in one line, what is wrong and how to mend it.
    """
    parser = Parser(prog="python -m dist_train", description="One rank of a training.")
    add_run_options(parser)
    return compose_request(parser.parse_intermixed_args(argv))


def compose_request(options: argparse.Namespace) -> Request:
    """Compose what parsed options ask for. Raises ConfigError."""
    composed = compose(
        options.overrides,
        config_dir=options.config_dir,
        config_file=options.config,
        explain=options.print_config,
    )
    refuse_redacted(composed.config)
    text = describe(composed) if options.print_config else None
    return Request(config=composed.config, text=text, dry_run=options.dry_run)


def refuse(
    message: str, exit_code: int, *, speak: bool, asked_to_end: Callable[[], bool] | None = None
) -> int:
    """Tell the user's mistake in one line on standard error; returns the process's exit code.

    Under `dist-train run` line and code go through a file and this process ends with 0: torchrun
    would neither keep the code nor be quiet about it.
    """
    verdict = os.environ.get(VERDICT_VARIABLE)
    if verdict:
        told = {"exit_code": exit_code, "reason": redact(message)}
        write_atomically(Path(verdict), json.dumps(told))  # whole, whichever rank is the last
        return 0
    if speak:
        print_error(message)
    else:
        let_another_speak(asked_to_end)
    return exit_code


def tell_met(chain: str, attempt: int) -> None:
    """Tell `dist-train run` on this machine what its ranks have agreed on with all others."""
    verdict = os.environ.get(VERDICT_VARIABLE)
    if verdict:
        path = Path(verdict).with_name(MET_FILE)
        write_atomically(path, json.dumps({"chain": chain, "attempt": attempt}))


def tell_begun(*, over: bool = False) -> None:
    """Tell `dist-train run` on this machine that ranks have taken their first step, or ended."""
    verdict = os.environ.get(VERDICT_VARIABLE)
    if verdict:
        mark = Path(verdict).with_name(BEGUN_FILE)
        mark.unlink(missing_ok=True) if over else mark.touch()


def has_begun(verdict: Path) -> bool:
    """Say whether the ranks that run now have taken their first step."""
    return verdict.with_name(BEGUN_FILE).exists()


def what_met(verdict: Path, chain: str) -> tuple[str, int]:
    """Return the chain and the attempt that the ranks last agreed on.

    Args:
        verdict: the file of VERDICT_VARIABLE.
        chain: this machine's own name for it: what holds until they have met (attempt -1).
    """
    told = read_json(verdict.with_name(MET_FILE))
    return told.get("chain", chain), told.get("attempt", -1)


def let_another_speak(asked_to_end: Callable[[], bool] | None = None) -> None:
    """Wait before a silent end: the launcher ends all ranks with the first, the speaker too."""
    if not {"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"} & os.environ.keys():
        return
    for _ in range(round(LINGER_SEC / LINGER_SLICE_SEC)):
        if asked_to_end is not None and asked_to_end():
            return
        time.sleep(LINGER_SLICE_SEC)


def print_error(message: str) -> None:
    """Write the one line that a mistake gets; one of the user's own code has a few."""
    lines = [" ".join(line.split()) for line in redact(message).split(NEXT_LINE)]
    with contextlib.suppress(OSError, ValueError):  # nobody hears; the exit code tells
        put(sys.stderr, f"dist-train: error: {NEXT_LINE.join(lines)}\n")


def stop_with_parent(number: signal.Signals | None = signal.SIGTERM) -> None:
    """Ask Linux for a signal when the process that started this one dies, however it dies.

    For torchrun and its ranks: they would train on unsupervised when what started them is killed.
    """
    pr_set_pdeathsig = 1  # man 2 prctl
    with contextlib.suppress(OSError, AttributeError):  # not on other systems
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number or signal.SIGTERM)
