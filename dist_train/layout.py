"""Who am I among the ranks, read from the launcher's variables; and is the whole table sane?

Pure functions: no torch, no network, so that every case can be tested without the machines.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import ConfigError
from dist_train.slurm_step import Task, find_task, number

# Set by what starts ranks again and again: the name of its chain, and which attempt comes next.
CHAIN_VARIABLE, ATTEMPT_VARIABLE = "DIST_TRAIN_CHAIN", "DIST_TRAIN_ATTEMPT"
HERE = ("localhost", "0.0.0.0", "::1", "::")  # addresses that lead every machine to itself
FIRST_PORT, NUM_PORTS = 15_000, 15_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """This process's place, as the launcher gave it."""

    launcher: str  # torchrun | slurm | single
    rule: str = "no launcher"  # by which this was found, in words
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    attempt: int = 0  # restarts of this chain so far, as far as this process can know
    first_attempt: int = 0  # of this launch
    run_id: str = ""  # of torchrun's rendezvous, the same on all nodes; "": none was given
    chain: str = ""  # one launcher's start; restarts and requeues keep it
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    store_is_served: bool = False  # torchrun's agent already listens at the master's address


def detect_layout(env: Mapping[str, str], *, parent: int = 0) -> Layout:
    """Read torchrun's variables, else those of a SLURM step, else say: one process.

    Args:
        env: the process's environment.
        parent: the process that started this one; torchrun's agent keeps it over its restarts.

    Raises:
        ConfigError: a variable is missing or is no number.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _of_torchrun(env, parent)
    task, rule = find_task(env)
    if task is not None:
        return _of_slurm(env, task)
    return Layout(launcher="single", rule=rule, chain=env.get(CHAIN_VARIABLE, ""))


def _of_torchrun(env: Mapping[str, str], parent: int) -> Layout:
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise ConfigError(
            "RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not: start with "
            "torchrun, or unset RANK and WORLD_SIZE for a single process"
        )
    world_size = number(env, "WORLD_SIZE")
    before = number(env, ATTEMPT_VARIABLE, env.get("SLURM_RESTART_COUNT", "0"))
    return Layout(
        launcher="torchrun",
        rule="torchrun",
        rank=number(env, "RANK"),
        local_rank=number(env, "LOCAL_RANK", "0"),
        world_size=world_size,
        local_world_size=number(env, "LOCAL_WORLD_SIZE", str(world_size)),
        run_id=env.get("TORCHELASTIC_RUN_ID", "").removesuffix("none"),
        attempt=before + number(env, "TORCHELASTIC_RESTART_COUNT", "0"),
        first_attempt=before,
        chain=env.get(CHAIN_VARIABLE)
        or env.get("SLURM_JOB_ID")
        or f"{env.get('TORCHELASTIC_RUN_ID', 'none')}-{parent}",
        master_addr=env["MASTER_ADDR"],
        master_port=number(env, "MASTER_PORT"),
        store_is_served=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(env: Mapping[str, str], task: Task) -> Layout:
    given = env.get("MASTER_ADDR") or task.nodes[0]
    if len(task.nodes) > 1 and (given in HERE or given.startswith("127.")):
        raise ConfigError(
            f"MASTER_ADDR={given} leads each of the {len(task.nodes)} nodes to itself, it may be "
            f"left over in your shell: unset it, or set it to the first node's ({task.nodes[0]})"
        )
    attempt = number(env, ATTEMPT_VARIABLE, str(task.restarts))
    port = port_of(f"{task.job}.{task.step}.{attempt}")
    return Layout(
        launcher="slurm",
        rule=str(task),
        rank=task.rank,
        local_rank=task.local_rank,
        world_size=task.num_tasks,
        local_world_size=task.tasks_here,
        attempt=attempt,
        first_attempt=attempt,
        chain=env.get(CHAIN_VARIABLE) or f"slurm-{task.job}",
        master_addr=given,
        master_port=number(env, "MASTER_PORT", str(port)),
    )


def elastic_nodes(parent: int, env: Mapping[str, str]) -> str | None:
    """Return MIN:MAX of torchrun's --nnodes if it is such a range, by its command line (Linux)."""
    given = word_of_torchrun("nnodes", parent, env)
    least, _, most = given.partition(":")
    return given if most and least != most else None


def word_of_torchrun(option: str, parent: int, env: Mapping[str, str]) -> str:
    """Return what torchrun was given for --OPTION; "" if nothing, or if its words are not seen.

    Not seen are those of another user or PID namespace, and none where there is no /proc.

    Args:
        option: its name, as in rdzv-backend.
        parent: torchrun's process.
        env: of a rank, which inherits that of torchrun.
    """
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    given = env.get(f"PET_{option.upper().replace('-', '_')}", "")
    for word, following in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("_", "-") == option:
            given = value or following
    return given


def port_of(name: str) -> int:
    """Return a port that follows from a name, below Linux's range of outgoing connections."""
    digest = hashlib.sha256(name.encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:4], "big") % NUM_PORTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """What a rank says of itself before the process group is made."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    device: str  # "cpu" or the GPU's unique name
    config_hash: str
    versions: str
    error: str | None = None  # why this rank cannot start


def check_registrations(table: list[Registration], world_size: int) -> str | None:
    """Return a sentence that says what is wrong with the table of ranks, or None."""
    for entry in table:
        if entry.error is not None:
            return f"rank {entry.rank} on {entry.host}: {entry.error}"
    twice = [rank for rank, n in Counter(entry.rank for entry in table).items() if n > 1]
    if twice:
        return (
            f"two processes are rank {twice[0]}: give every node its own --node-rank, and start "
            "one process for each task"
        )
    missing = sorted(set(range(world_size)) - {entry.rank for entry in table})
    if missing:
        return (
            f"rank {', '.join(map(str, missing))} of {world_size} did not come: start as many "
            "processes on every node as --nproc-per-node (or --ntasks-per-node) and --nnodes say"
        )
    for entry in table:
        if entry.world_size != world_size:
            return (
                f"rank {entry.rank} on {entry.host} was told world_size={entry.world_size}, rank 0 "
                f"{world_size}: give all nodes the same --nnodes and --nproc-per-node"
            )
    gpus: dict[tuple[str, str], Registration] = {}
    for entry in table:
        if entry.device == "cpu":
            continue
        other = gpus.setdefault((entry.host, entry.device), entry)
        if other is not entry:
            return (
                f"rank {other.rank} and rank {entry.rank} are both on GPU {entry.device} of "
                f"{entry.host}: start one process for each GPU (--nproc-per-node, "
                "--ntasks-per-node), or mend --gpu-bind or CUDA_VISIBLE_DEVICES"
            )
    kinds = {entry.device == "cpu" for entry in table}
    if len(kinds) > 1:
        cpu = next(entry for entry in table if entry.device == "cpu")
        return (
            f"rank {cpu.rank} on {cpu.host} sees no GPU while others do: mend its driver, or set "
            "device=cpu for all"
        )
    for what in ("config_hash", "versions"):
        odd = [e for e in table if getattr(e, what) != getattr(table[0], what)]
        if odd:
            name = "settings" if what == "config_hash" else "software"
            return (
                f"rank {odd[0].rank} on {odd[0].host} has other {name} "
                f"({getattr(odd[0], what)}) than rank 0 ({getattr(table[0], what)}): give every "
                "node the same command, files and installation"
            )
    return None
