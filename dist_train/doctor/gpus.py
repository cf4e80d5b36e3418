"""Has each rank a GPU of its own? Decided from torch's unique names, else from SLURM's binding.

Not tested on a machine with several GPUs; the rules by SLURM's variables are, with fake ones.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from dist_train.doctor.finding import Section, counted, listed, ranks_of
from dist_train.doctor.machine import Machine
from dist_train.doctor.meeting import Arrival


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The GPU that a rank takes, by the rule of dist_train.device."""

    visible: list[str]  # names of the GPUs that this rank can take
    index: int  # of the one that it takes; beyond the list: it has none
    source: Literal["torch", "SLURM", "number"]  # number: may count from 0 again for each rank

    @property
    def name(self) -> str | None:
        """The name of that GPU."""
        return self.visible[self.index] if self.index < len(self.visible) else None


def choice_of(machine: Machine, arrival: Arrival, *, by_slurm: bool) -> Choice | None:
    """Return the GPU that a rank takes; None if nothing says that it has one."""
    numbers = _words(machine.env.get("CUDA_VISIBLE_DEVICES", ""))
    bound = _words(machine.env.get("SLURM_STEP_GPUS", ""))
    source: Literal["torch", "SLURM", "number"]
    if arrival.gpus:
        visible, source = arrival.gpus, "torch"
    elif bound and (not numbers or len(numbers) == len(bound)):
        visible, source = bound, "SLURM"  # these count over the whole node
    elif bound:  # numbers of the user's own: equal ones of equal lists are one GPU
        visible, source = [f"{word} of {','.join(bound)}" for word in numbers], "SLURM"
    elif numbers:
        unique = all(word.startswith(("GPU-", "MIG-")) for word in numbers)
        visible, source = numbers, "torch" if unique else "number"
    else:
        return None
    of_its_own = len(visible) == 1 or by_slurm
    index = machine.local_rank % len(visible) if of_its_own else machine.local_rank
    return Choice(visible=visible, index=index, source=source)


def judge_gpus(machines: list[Machine], arrivals: dict[int, Arrival], *, by_slurm: bool) -> Section:
    """Has each rank a GPU, and no other rank the same one?"""
    section = Section(title="GPUs")
    choices = {
        m.rank: (m, choice)
        for m in machines
        if m.rank in arrivals
        and (choice := choice_of(m, arrivals[m.rank], by_slurm=by_slurm)) is not None
    }
    if not choices:
        section.unchecked("GPUs: no rank has one, training would run on CPUs")
        return section
    takers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, (machine, choice) in choices.items():
        if choice.name is None:
            count = counted(choice.visible, "GPU")
            section.error(
                f"local rank {machine.local_rank} on {{nodes}} can take {count}, so it has none "
                "of its own: start fewer ranks (--ntasks-per-node, --nproc-per-node), or ask for "
                "more GPUs (--gpus-per-node)",
                node=machine.node,
            )
            continue
        takers[machine.node, choice.name].append(rank)
        told = f"rank {rank} on {machine.node}: GPU {choice.name} of {listed(choice.visible)}"
        section.lines.append(f"{told} {arrivals[rank].gpu_model}".rstrip())
    without = [m for m in machines if m.rank not in choices and m.rank in arrivals]
    if without:
        section.error(
            f"{ranks_of(m.rank for m in without)} on {listed({m.node for m in without})} see no "
            "GPU while others do: look at the driver there, and at --gpus-per-node"
        )
    for (_, name), ranks in takers.items():
        if len(ranks) > 1:
            sharing, first = [choices[rank][0] for rank in ranks], choices[ranks[0]][1]
            _tell(section, name, sharing, first, by_slurm=by_slurm)
    if by_slurm and not any(arrivals[rank].gpus for rank in choices):
        section.unchecked("the GPUs themselves: torch sees none, only SLURM's binding was read")
    return section.fine_if_nothing("each rank has a GPU of its own")


def _tell(
    section: Section, name: str, machines: list[Machine], choice: Choice, *, by_slurm: bool
) -> None:
    """Say that ranks of a node share a GPU, and which flag to change."""
    first, each = machines[0], machines[0].local_world_size
    who = f"local ranks {listed(m.local_rank for m in machines)} on {{nodes}}"
    bind = first.env.get("SLURMD_TRES_BIND", "").removeprefix("gres/").removeprefix("gpu:")
    one_each = f"--gpus-per-node={each} with --ntasks-per-node={each}"
    cure = f"give {one_each}, and do not set CUDA_VISIBLE_DEVICES yourself"
    if bind and bind != "none":
        cure = f"leave out --gpu-bind={bind} and give {one_each}"
    if not by_slurm:
        cure = "start one rank for each GPU (--nproc-per-node), and let them see all or one each"
    if choice.source == "number":
        section.warning(
            f"{who} all have CUDA_VISIBLE_DEVICES={first.env['CUDA_VISIBLE_DEVICES']}, which is "
            "one GPU unless cgroups number each rank's GPUs from 0 (torch sees none, and cannot "
            f"say): {cure}",
            node=first.node,
        )
        return
    by = "by SLURM's binding " * (choice.source == "SLURM")
    section.error(f"{who} are {by}on one GPU ({name}): {cure}", node=first.node)


def _words(text: str) -> list[str]:
    """Read `0,1` or `0-1`, as SLURM and CUDA write lists of GPUs."""
    words: list[str] = []
    for word in filter(None, text.split(",")):
        first, _, last = word.partition("-")
        if first.isdigit() and last.isdigit():
            words += [str(number) for number in range(int(first), int(last) + 1)]
        elif word.strip() not in ("-1", "NoDevFiles"):
            words.append(word.strip())
    return words
