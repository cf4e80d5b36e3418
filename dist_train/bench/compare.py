"""Two reports of the benchmark side by side: what changed beyond noise. Imports no torch."""

import math
import statistics
from typing import Any

from dist_train.bench.breakdown import MEANS, PARTS
from dist_train.bench.intervals import geometric_mean_of, t_99

LEAST_CHANGE = 0.015  # of the step: less is not worth a word, however sure it is
BLUNT = 0.05  # a comparison that would not have told a change of so much has told nothing
# Told where they differ.
OF_THE_JOB = (
    "dataset",
    "precision",
    "memory_format",
    "threads",
    "sync",
    "micro_batch_size",
    "loader",
    "flops_per_sample",
    "gradient_bytes",
)
OF_THE_FIXED_NET = {"device": "on another device", "threads": "with another number of threads"}
LARGEST = 2.4  # of the logarithm of a change: larger ones are told as "over 1,000 %"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each setup that both have.

    The step times are divided by those of a fixed small net, measured right before and after them:
    a machine that is slower today is not taken for slower code. A change is told if its 99 %
    interval (Welch 1947, Biometrika 34:28) leaves out zero and it is 1.5 % or more: of 95 % ones,
    one line in twenty would tell what is not there.
    """
    known = {_key(r): r for r in old["setups"]}
    lines = []
    for result in new["setups"]:
        before = known.get(_key(result))
        if before is None:
            continue
        change, half = _log_change(
            before["relative_step_of_launches"], result["relative_step_of_launches"]
        )
        machine, _ = _log_change(
            before["reference_sec_of_launches"], result["reference_sec_of_launches"]
        )
        strange = _differences(before, result, tuple(OF_THE_FIXED_NET))
        told = not strange and abs(change) > half and abs(math.expm1(change)) >= LEAST_CHANGE
        lines.append(
            {
                "num_ranks": result["num_ranks"],
                "global_batch_size": result["global_batch_size"],
                "change": _exp(change),
                "low": _exp(change - half),
                "high": _exp(change + half),
                "hidden": max(LEAST_CHANGE, _exp(half)),  # a smaller one is not told
                "machine": _exp(machine),
                "incomparable": list(strange),
                "changed": told,
                "part": _part_that_changed(before, result, change) if told else None,
                "differs": _differences(before, result, OF_THE_JOB),
            }
        )
    return lines


def as_text(lines: list[dict[str, Any]], old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the comparison in words."""
    if not lines:
        return "nothing to compare: the two reports have no number of ranks and batch in common\n"
    told = [f"compared with {old['created']} ({old['command']}):"]
    of_all = _differences(old, new, ("experiment",))
    of_all |= _differences(
        old["machine"], new["machine"], ("cpu", "cores", "device", "torch", "python")
    )
    told += [f"  {_difference(what, of_all[what])}" for what in of_all]
    for line in lines:
        ranks = "1 rank" if line["num_ranks"] == 1 else f"{line['num_ranks']} ranks"
        where = f"{ranks}, batch {line['global_batch_size']}"
        span = f"{_percent(line['change'])} ({_percent(line['low'])} to {_percent(line['high'])})"
        machine = line["machine"]
        hour = f"; the machine itself {_percent(machine)}" if abs(machine) > 0.01 else ""
        told += [f"  {where}: {_difference(*item)}" for item in line["differs"].items()]
        if line["incomparable"]:
            other = " and ".join(OF_THE_FIXED_NET[name] for name in line["incomparable"])
            told.append(
                f"  {where}: nothing can be told: the fixed net that both are divided by "
                f"ran {other}"
            )
            continue
        if not line["changed"]:
            told.append(f"  {where}: {_unchanged(line['hidden'])}: {span}{hour}")
            continue
        part = f", most of it {MEANS[line['part']]}" if line["part"] else ""
        faster = "longer" if line["change"] > 0 else "shorter"
        told.append(f"  {where}: steps are {faster}: {span}{part}{hour}")
    return "\n".join(told) + "\n"


def _unchanged(hidden: float) -> str:
    if hidden <= BLUNT:
        return f"no change of the step time beyond noise, which would hide one of {hidden:.1%}"
    most = f"up to {hidden:.0%}" if hidden < math.expm1(LARGEST) else "over 1,000%"
    return (
        f"nothing can be told, as noise hides changes of the step time of {most}; both reports "
        "need more launches (--repeats) on an idle machine"
    )


def _exp(log: float) -> float:
    return math.expm1(max(-LARGEST, min(LARGEST, log)))


def _percent(share: float) -> str:
    return f"{share:+.1%}" if share < math.expm1(LARGEST) else "over +1,000%"


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    return result["num_ranks"], result["num_nodes"], result["global_batch_size"]


def _log_change(before: list[float], after: list[float]) -> tuple[float, float]:
    """Return the change of the logarithm's mean, and half of its 99 % interval."""
    logs = [[math.log(value) for value in values] for values in (before, after)]
    means = [statistics.fmean(values) for values in logs]
    errors = [statistics.variance(values) / len(values) for values in logs]
    total = sum(errors)
    if total == 0.0:
        return means[1] - means[0], 0.0
    freedom = total**2 / sum(
        error**2 / (len(values) - 1) for error, values in zip(errors, logs, strict=True) if error
    )
    return means[1] - means[0], t_99(max(1, int(freedom))) * math.sqrt(total)


def _differences(
    old: dict[str, Any], new: dict[str, Any], names: tuple[str, ...]
) -> dict[str, list[Any]]:
    """Return [then, now] of each name that both have and that is not the same."""
    both = [name for name in names if name in old and name in new]
    return {name: [old[name], new[name]] for name in both if old[name] != new[name]}


def _difference(what: str, values: list[Any]) -> str:
    then, now = values
    return f"not the same {what}: {then} then, {now} now"


def _part_that_changed(before: dict[str, Any], after: dict[str, Any], change: float) -> str | None:
    """Return the part that did most for `change`, the parts adjusted as the steps are."""
    if before["parts_sec"] is None or after["parts_sec"] is None:
        return None
    then, now = (
        geometric_mean_of(r["relative_step_of_launches"]).value / r["step_sec"]["value"]
        for r in (before, after)
    )
    grown = {
        name: after["parts_sec"][name] * now - before["parts_sec"][name] * then for name in PARTS
    }
    return max(PARTS, key=lambda name: math.copysign(1, change) * grown[name])
