"""Which form sums the gradients: as asked for, or by device and what is found out there."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.cuda import nccl

from dist_train import ddp, ddp_check
from dist_train.config import Config
from dist_train.config.earlier import SYNC
from dist_train.config.value_synonyms import FORMER_VALUES
from dist_train.config.whole_file import read_json, write_atomically
from dist_train.data.cache import cache_root
from dist_train.ddp_check import Found, try_ddp
from dist_train.distributed import Ranks
from dist_train.parallel import Form

FILE = "ddp_recovers.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A form, and what to tell of it."""

    form: Form
    remark: str = ""
    warning: str | None = None


def choose_form(config: Config, ranks: Ranks, before: Mapping[str, Any]) -> Choice:
    """Choose the form that sums the gradients: the same on all ranks. Collective.

    Args:
        config: of the run.
        ranks: its ranks.
        before: the facts of the state that it takes up; empty if there is none.
    """
    if config.train.order == "fixed":
        return Choice(form=Form(name="fixed"))
    asked = config.parallel.sync
    wanted = _auto(ranks, before) if asked == "auto" else asked
    if wanted == "flat" or ranks.control is None:
        return Choice(form=Form(name="flat"), remark=_remark("flat", config, ranks))
    found = _found(config, ranks)
    if found.recovers:
        return Choice(form=Form(name="ddp"), remark=_remark("ddp", config, ranks, found))
    tried = f"parallel.sync={asked}: DDP was tried out here for {found.sec:.1f} s, and"
    if not found.sums:
        return Choice(
            form=Form(name="flat"),
            warning=f"{tried} cannot be trusted ({found.reason}): the gradients are summed as one "
            "buffer (parallel.sync=flat). That goes through the same links: `dist-train doctor` "
            "examines them",
        )
    if asked == "auto":
        return Choice(
            form=Form(name="flat"),
            warning=f"{tried} one rank's failure in a step could not be taken back "
            f"({found.reason}): parallel.sync=flat, which recovers, is used",
        )
    return Choice(
        form=Form(name="ddp", recoverable=False),
        warning=f"{tried} one rank's failure in a step could not be taken back ({found.reason}): "
        "a rank that runs out of memory or raises in a step ends the run; parallel.sync=flat "
        "recovers",
    )


def form_of(facts: Mapping[str, Any]) -> Any:
    """Return the form that a state was made with, by today's name; None: it does not say."""
    form = facts.get(SYNC)
    return FORMER_VALUES[SYNC].get(str(form), form)


def _auto(ranks: Ranks, before: Mapping[str, Any]) -> Literal["flat", "ddp"]:
    """Return the form that a state was made with, so that its bits go on; else the device's."""
    form = form_of(before)
    if before.get("world_size") == ranks.world_size and form in ("flat", "ddp"):
        return form
    # On CPUs there is nothing beside the backward that could compute the sums.
    return "ddp" if ranks.device.type == "cuda" and ranks.world_size > 1 else "flat"


def _remark(name: str, config: Config, ranks: Ranks, found: Found | None = None) -> str:
    if ranks.world_size == 1:
        return ""
    chosen = " (auto)" if config.parallel.sync == "auto" else ""
    how = ""
    if found is not None:
        tried = f"in {found.sec:.2f} s" if found.sec else "by an earlier start"
        how = f", and a failure in a step can be taken back: tried out {tried}"
    return f"parallel.sync={name}{chosen}{how}"


def _found(config: Config, ranks: Ranks) -> Found:
    """Return what DDP does here; what was found on GPUs counts for later starts. Collective."""
    find_unused = config.parallel.find_unused_parameters
    if ranks.device.type != "cuda":
        return try_ddp(ranks, find_unused=find_unused)
    file, key = cache_root(config.data) / FILE, _key(ranks.device, find_unused=find_unused)
    if all(ranks.gather(read_json(file).get(key) is True)):
        return Found(sums=True, recovers=True)
    found = try_ddp(ranks, find_unused=find_unused)
    if found.recovers and ranks.local_rank == 0:
        with contextlib.suppress(OSError):  # the next start tries it out again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, f"{json.dumps(read_json(file) | {key: True}, indent=1)}\n")
    return found


def _key(device: torch.device, *, find_unused: bool) -> str:
    """Return what the answer depends on: torch, NCCL, the GPU, and how it was found."""
    code = "".join(inspect.getsource(module) for module in (ddp, ddp_check))
    parts = (
        f"torch {torch.__version__}",
        f"NCCL {'.'.join(map(str, nccl.version()))}",
        torch.cuda.get_device_name(device),
        f"find_unused_parameters={str(find_unused).lower()}",
        hashlib.sha256(code.encode()).hexdigest()[:8],
    )
    return ", ".join(parts)
