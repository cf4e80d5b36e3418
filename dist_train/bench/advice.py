"""What to change first, in a sentence, with the gain that it should bring. Imports no torch."""

from typing import Any

WORTH = 0.03  # of the step: less is not worth a change
SLOW_RANK = 1.15  # times a usual rank
NO_ONES = 0.5  # what a wait for no rank in particular counts: its cure is the least certain


def advice_for(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return {text, gain, part} for one setup; None if its parts were not measured.

    `gain` is the share of the step's time that is saved if the part goes away wholly. Of the parts
    the one counts whose cost is at least the most: by the lower end of its interval. Only if none
    is sure, the likely one counts.
    """
    avoidable = _avoidable(result)
    if avoidable is None:
        return None
    step = result["step_sec"]["value"]
    doubt = {"waiting": NO_ONES} if _slow_rank(result) is None else {}
    sure = {
        name: doubt.get(name, 1.0) * (sec - half)
        for name, (sec, half) in avoidable.items()
        if half is not None
    }
    likely = {name: doubt.get(name, 1.0) * sec for name, (sec, _) in avoidable.items()}
    value = {name: sec for name, (sec, _) in avoidable.items()}
    for ranking in (sure, likely, value):
        part = max(ranking, key=lambda name: ranking[name], default=None)
        if part is not None and ranking[part] >= WORTH * step:
            sec, half = avoidable[part]
            text = f"{_TEXTS[part](result, sec)} {_gain(sec / step, half and half / step)}"
            return {"part": part, "gain": sec / step, "text": text}
    return {"part": "compute", "gain": None, "text": _about_compute(result)}


def _avoidable(result: dict[str, Any]) -> dict[str, tuple[float, float | None]] | None:
    """Return (seconds, half of their interval) of each part that a change may save."""
    parts, halves = result["parts_sec"], result["parts_half_sec"]
    if parts is None:
        return None
    found = {
        name: (parts[name], halves[name]) for name in ("data", "host", "waiting", "all_reduce")
    }
    scaling = next(iter(result["lost_sec"]), None)
    if scaling is not None:
        names = ("forward", "backward", "optimizer")
        sec = sum(result["lost_sec"][scaling][name] for name in names)
        halves = result["lost_half_sec"][scaling]
        known = [halves[name] for name in names if halves[name] is not None]
        half = sum(known) if len(known) == len(names) else None  # they are of the same blocks
        found["sharing"] = (sec, half)
    return found


def _gain(gain: float, half: float | None) -> str:
    told = f"A step would be up to {gain:.0%}"
    if half is None or half < 0.005:
        return f"{told} shorter."
    if half < gain:
        return f"{told} (± {half:.0%}) shorter."
    return f"{told} shorter, which is not sure (± {half:.0%}): --repeats and --seconds make it so."


def _data(result: dict[str, Any], sec: float) -> str:
    if result["loader"] == "memory":
        cure = (
            "the pictures are in memory, so what is left is to cut, mirror and mix them: leave out "
            "what the accuracy does not need (data.crop_padding, data.cutout, data.mixup, "
            "data.cutmix)"
        )
        cure += ", or give each rank more cores." if result["device"] == "cpu" else "."
    else:
        cure = (
            "for pictures that fit into memory set data.loader=memory, else raise "
            "data.num_workers (auto: one a core of the rank's), or store the pictures smaller."
        )
    return f"Steps wait {_ms(sec)} for their batch: {cure}"


def _host(result: dict[str, Any], sec: float) -> str:
    return (
        f"Python needs {_ms(sec)} a step beside the model: give each step more to do (a larger "
        "train.global_batch_size or train.micro_batch_size)."
    )


def _waiting(result: dict[str, Any], sec: float) -> str:
    slow = _slow_rank(result)
    if slow is None:
        return (
            f"Ranks wait {_ms(sec)} for whichever is the slowest, each of them now and then: look "
            "for other work on the machine."
        )
    return (
        f"Rank {slow['rank']} on {slow['host']} takes {slow['times']:.2f} times as long as the "
        f"others, which wait {_ms(sec)} for it: `dist-train doctor` says what is wrong there."
    )


def _slow_rank(result: dict[str, Any]) -> dict[str, Any] | None:
    """Return the rank that the others wait for, if it is one."""
    slow = result["slowest_rank"]
    return slow if slow is not None and slow["times"] >= SLOW_RANK else None


def _all_reduce(result: dict[str, Any], sec: float) -> str:
    size = result["gradient_bytes"] / 1e6
    rate = result["gradient_bytes"] / max(sec, 1e-9) / 1e9
    cure = (
        "parallel.sync=ddp hides it behind the backward, and a larger batch makes it rarer"
        if result["sync"] == "flat"
        else "a larger batch makes it rarer, and `dist-train doctor` measures the links"
    )
    return (
        f"The sum of {size:.3g} MB of gradients over the ranks costs {_ms(sec)} that nothing hides "
        f"({rate:.2g} GB/s): {cure}."
    )


def _sharing(result: dict[str, Any], sec: float) -> str:
    if result["device"] == "cpu":
        return (
            f"Ranks compute {_ms(sec)} longer than one alone would for its share: they share this "
            "machine's memory, caches and clock, and small batches use the cores less well."
        )
    return (
        f"Ranks compute {_ms(sec)} longer than one alone would for its share: a smaller batch uses "
        "a GPU less well; give each rank more (a larger train.global_batch_size)."
    )


def _about_compute(result: dict[str, Any]) -> str:
    text = f"Nothing but the model itself is left: {result['mfu']:.0%} of the peak is used"
    if result["precision"] == "fp32":
        return f"{text}; precision=bf16 is the next thing to try where the hardware has it."
    return f"{text}; a larger batch, or another model, is what changes that."


def _ms(sec: float) -> str:
    return f"{1000 * sec:.1f} ms"


_TEXTS = {
    "data": _data,
    "host": _host,
    "waiting": _waiting,
    "all_reduce": _all_reduce,
    "sharing": _sharing,
}
