"""What a job asks SLURM for: options of `dist-train submit`, with defaults in configs/cluster.

They do not change what is trained, so they are no part of a run's configuration.
"""

import argparse
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import yaml

from dist_train.config import ConfigError
from dist_train.config.compose import BUNDLED, CHECKOUT
from dist_train.config.typed import build, did_you_mean
from dist_train.config.yaml_limits import check_yaml
from launch.ranks_command import check_exports
from launch.sbatch_options import check_sbatch_arg

DEFAULT = "default"
TIMES = (
    "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or UNLIMITED"
)
UNLIMITED = ("UNLIMITED", "INFINITE")  # as SLURM spells it, in any case
MINUTES_OF = {"d": 24 * 60, "h": 60, "m": 1, "s": 1 / 60}


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSettings:
    """The keys of configs/cluster/NAME.yaml; each is an option of the command line, too."""

    shape: Literal["srun", "torchrun"] = "srun"
    nodes: str = "1"
    gpus_per_node: str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    comment: str | None = None
    reservation: str | None = None
    dependency: str | None = None
    exclusive: bool = False
    array_parallelism: int | None = None
    python: str | None = None
    setup: tuple[str, ...] = ()
    srun_arg: tuple[str, ...] = ()
    sbatch_arg: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """How many GPUs of each node the job asks for."""
        return 0 if self.gpus_per_node is None else int(self.gpus_per_node.rpartition(":")[2])

    @property
    def ranks_per_node(self) -> int:
        """The ranks of a node: those asked for, else one for each GPU."""
        return self.gpus if self.tasks_per_node is None else self.tasks_per_node

    @property
    def node_counts(self) -> range:
        """Every number of nodes that the job may get."""
        least, _, most = self.nodes.partition("-")
        return range(int(least), int(most or least) + 1)

    @property
    def minutes(self) -> int | None:
        """The time limit; SLURM counts in minutes and rounds up. None: the partition's, or none."""
        return None if self.time is None or self.is_unlimited else minutes_of(self.time)

    @property
    def is_unlimited(self) -> bool:
        """Whether the job asks for no time limit."""
        return self.time is not None and self.time.upper() in UNLIMITED


HELP = {
    "shape": "srun: srun starts each rank; torchrun: srun starts one torchrun on each node",
    "nodes": "nodes: 4, or 2-4 to take what is free",
    "gpus_per_node": "GPUs of each node: 8, or a100:8",
    "tasks_per_node": "ranks of each node, if not one for each GPU",
    "cpus_per_task": "cores of each rank",
    "time": f"the time limit: {TIMES}",
    "mem": "memory of each node: 64G; 0: all of it",
    "partition": "where to run",
    "account": "on whose account",
    "qos": "quality of service",
    "constraint": "features that the nodes must have",
    "exclude": "nodes that must not take part",
    "nodelist": "nodes that must take part",
    "comment": "a text that SLURM keeps with the job",
    "reservation": "a reservation to run in",
    "dependency": "jobs to wait for: afterok:77",
    "exclusive": "share the nodes with no other job",
    "array_parallelism": "elements of a sweep that run at a time; all, if not given",
    "python": "the ranks' Python, if another than this one: in a container",
    "setup": "a line of shell for the job's script, such as 'module load cuda'; repeatable",
    "srun_arg": "a word for srun: --srun-arg=--container-image=my.sqsh; repeatable",
    "sbatch_arg": "another option for sbatch: --sbatch-arg=--mail-type=END; repeatable",
}


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting, and --cluster."""
    group = parser.add_argument_group("what to ask SLURM for (the file of --cluster has defaults)")
    group.add_argument(
        "--cluster", default=DEFAULT, metavar="NAME", help="configs/cluster/NAME.yaml, or yours"
    )
    for name, hint in get_type_hints(JobSettings).items():
        option = f"--{name.replace('_', '-')}"
        if hint is bool:
            group.add_argument(option, action="store_true", default=None, help=HELP[name])
        elif hint == tuple[str, ...]:
            group.add_argument(option, action="append", metavar="LINE", help=HELP[name])
        elif name == "shape":
            group.add_argument(option, choices=("srun", "torchrun"), help=HELP[name])
        else:
            kind, shown = (int, "N") if hint == int | None else (str, "VALUE")
            group.add_argument(option, type=kind, metavar=shown, help=HELP[name])


def settings_of(options: argparse.Namespace) -> JobSettings:
    """Return what parsed options ask for, over the defaults of the file that they name.

    A list adds to the file's.

    Raises:
        ConfigError: no such file, an unknown key, or a value that cannot be.
    """
    path = _file_of(options.cluster, options.config_dir)
    settings = read_settings(path)
    for name, hint in get_type_hints(JobSettings).items():
        value = getattr(options, name)
        if value is not None:
            value = (*getattr(settings, name), *value) if hint == tuple[str, ...] else value
            settings = dataclasses.replace(settings, **{name: value})
    _check(settings)
    return settings


def read_settings(path: Path) -> JobSettings:
    """Read a file of settings. Raises ConfigError."""
    try:
        check_yaml(path, str(path))
        text = path.read_text()
        values = yaml.safe_load(text) or {}
        # YAML makes 14400 of 4:00:00; what shall be text is taken as it is spelt.
        spelt = yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no mapping of settings: write lines like `nodes: 2`")
    hints = get_type_hints(JobSettings)
    for name in values:
        if name not in hints:
            near = did_you_mean(str(name), list(hints))
            raise ConfigError(f"{path}: unknown key {str(name)!r}{near or ': see its comments'}")
        if hints[name] in (str, str | None) and isinstance(values[name], int | float):
            values[name] = spelt[name]
    try:
        return build(JobSettings, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def minutes_of(text: str) -> int:
    """Read a time limit in SLURM's forms. Raises ConfigError."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    units = "hms"[: len(parts)] if dash else {1: "m", 2: "ms", 3: "hms"}.get(len(parts), "")
    words = [*([days] if dash else []), *parts]
    units = f"d{units}" if dash else units
    if len(units) != len(words) or not all(word.isdigit() for word in words):
        raise ConfigError(f"--time={text} is no time limit: write it as {TIMES}")
    minutes = sum(int(word) * MINUTES_OF[unit] for word, unit in zip(words, units, strict=True))
    if minutes <= 0:
        raise ConfigError(f"--time={text} leaves no time: give at least a minute")
    return int(-(-round(minutes * 60) // 60))


def _file_of(name: str, config_dir: Path | None) -> Path:
    folders = [config_dir] if config_dir else []
    folders = [folder / "cluster" for folder in (*folders, _bundled())]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    where = " or ".join(str(folder) for folder in folders)
    raise ConfigError(f"--cluster {name}: {where} has no {name}.yaml{did_you_mean(name, known)}")


def _bundled() -> Path:
    return BUNDLED if BUNDLED.is_dir() else CHECKOUT


def _check(settings: JobSettings) -> None:
    """Raise ConfigError for what SLURM would refuse in other words, or only in the job."""
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", settings.nodes) or not settings.node_counts:
        raise ConfigError(f"--nodes={settings.nodes} must be a number like 4, or a range like 2-4")
    gpus = settings.gpus_per_node
    if gpus is not None and not re.fullmatch(r"([\w.-]+:)?\d+", gpus):
        raise ConfigError(f"--gpus-per-node={gpus} must be a number like 8, or a type and a number")
    for name in ("tasks_per_node", "cpus_per_task", "array_parallelism"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value} is out of range: give 1 or more")
    if settings.ranks_per_node == 0:
        raise ConfigError(
            "how many ranks a node has is not said: give --gpus-per-node N, or --tasks-per-node N "
            "for a job without GPUs (or write it into configs/cluster)"
        )
    if 0 < settings.gpus < settings.ranks_per_node:
        raise ConfigError(
            f"--tasks-per-node={settings.tasks_per_node} puts several ranks on one GPU "
            f"(--gpus-per-node={gpus}): give at most {settings.gpus} tasks"
        )
    if settings.time is not None and not settings.is_unlimited:
        minutes_of(settings.time)
    for name, value in dataclasses.asdict(settings).items():
        if any("\n" in line for line in (value if isinstance(value, tuple) else [str(value)])):
            raise ConfigError(f"--{name.replace('_', '-')} has a line break in it: write one line")
    check_exports(settings.srun_arg)
    for word in settings.sbatch_arg:
        check_sbatch_arg(word)
