"""Who am I among the ranks, read from the launcher's variables; and is the whole table sane?

Pure functions: no torch, no network, so that every case can be tested without the machines.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dist_train.config import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """This process's place, as the launcher gave it."""

    launcher: str  # torchrun | slurm | single
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    attempt: int = 0  # restarts of this chain so far
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
        attempt = _number(env, "TORCHELASTIC_RESTART_COUNT", "0")
        world_size = _number(env, "WORLD_SIZE")
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError(
                "RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not: start with "
                "torchrun, or unset RANK and WORLD_SIZE for a single process"
            )
        return Layout(
            launcher="torchrun",
            rank=_number(env, "RANK"),
            local_rank=_number(env, "LOCAL_RANK", "0"),
            world_size=world_size,
            local_world_size=_number(env, "LOCAL_WORLD_SIZE", str(world_size)),
            run_id=env.get("TORCHELASTIC_RUN_ID", "").removesuffix("none"),
            attempt=attempt + _number(env, "SLURM_RESTART_COUNT", "0"),
            chain=env.get("DIST_TRAIN_CHAIN")
            or env.get("SLURM_JOB_ID")
            or f"{env.get('TORCHELASTIC_RUN_ID', 'none')}-{parent}",
            master_addr=env["MASTER_ADDR"],
            master_port=_number(env, "MASTER_PORT"),
            store_is_served=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _slurm_step(env)
    return Layout(launcher="single", chain=env.get("DIST_TRAIN_CHAIN", ""))


def _slurm_step(env: Mapping[str, str]) -> Layout:
    job, step = env.get("SLURM_JOB_ID", "0"), env["SLURM_STEP_ID"]
    attempt = _number(env, "SLURM_RESTART_COUNT", "0")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    # A port of this job's own, below Linux's ephemeral range; another one after each requeue.
    digest = hashlib.sha256(f"{job}.{step}.{attempt}".encode()).digest()
    port = 15000 + int.from_bytes(digest[:4], "big") % 15000
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    return Layout(
        launcher="slurm",
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=_tasks_here(tasks, _number(env, "SLURM_NODEID", "0"), world_size),
        attempt=attempt,
        chain=f"slurm-{job}",
        master_addr=env.get("MASTER_ADDR") or first_host(nodes),
        master_port=_number(env, "MASTER_PORT", str(port)),
    )


def first_host(nodelist: str) -> str:
    """Return the first host of SLURM's compressed list, such as `rack[1-2]node[03-7,9],login`."""
    first = re.split(r",(?![^\[]*\])", nodelist.strip())[0]
    return re.sub(r"\[([^\]]*)\]", lambda m: re.split("[-,]", m.group(1))[0], first)


def _tasks_here(tasks: str, node: int, default: int) -> int:
    """Read this node's number of tasks from SLURM's `2(x3),1`."""
    counts: list[int] = []
    for part in filter(None, tasks.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found:
            counts += [int(found.group(1))] * int(found.group(2) or 1)
    return counts[node] if node < len(counts) else default


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None or not text.lstrip("-").isdigit():
        raise ConfigError(f"the launcher's variable {name} is {text!r}: it must be a whole number")
    return int(text)


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
