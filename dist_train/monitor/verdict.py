"""Who hangs? Decided from the heartbeats of all ranks, by pure functions.

A rank that waits in a collective is a victim: the culprit is one that is gone, stopped, or silent
outside of a collective, and of these the one furthest behind. Nobody is blamed while a rank behind
him is within its own limit: it may be what the others wait for.

On GPUs, ranks that wait for one that is gone never come back by themselves: their kernel waits for
its data, and the host, inside CUDA, runs no handler of a signal.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dist_train.heartbeat import CALLS, NUMBER_OF, PHASES
from dist_train.monitor.processes import GONE, MEANING, STOPPED

ALL_WAIT = 1.6  # x the limit, if all wait: TCP takes 6.2 s to get over a cut of 3 s
GONE_SEC = 1.0  # for the others to notice by themselves, where they can
# Where DDP sums, and the host waits once the device's queue is full.
BESIDE_SUMS = (NUMBER_OF["forward"], NUMBER_OF["backward"])
LEFT = "left"  # as a state: it has left the watch, its process may live


class View(NamedTuple):
    """One rank as its node's monitor sees it."""

    rank: int
    host: str
    phase: int
    step: int
    waits: bool
    silence: float  # seconds
    limit: float
    state: str  # of /proc; GONE; LEFT
    busy_ns: int = 0
    delay_ns: int = 0  # ready to run, without a core
    calls: int = 0  # of collectives, so far
    call: int = 0  # the last of them
    values: int = 0  # how many it was given
    gone_sec: float = 0.0  # since its process was seen to be gone

    @property
    def place(self) -> tuple[int, int]:
        """How far it is."""
        return self.step, self.phase


class Verdict(NamedTuple):
    """Why the group has to end, and because of whom."""

    culprits: tuple[int, ...]  # ranks, the first cause first; empty: it is not one rank's fault
    rank: int  # for the record: the first culprit, else the rank furthest behind
    step: int
    text: str


def decide(
    views: Sequence[View],
    *,
    hang_sec: float,
    lost: Sequence[str] = (),
    all_wait_sec: float = 0.0,
    on_gpu: bool = False,
) -> Verdict | None:
    """Return who hangs, or None while there is no need to say so.

    Args:
        views: all ranks that are known, as of now.
        hang_sec: how long a stopped process is given.
        lost: nodes that were heard of and are not any more.
        all_wait_sec: the least time that all must have waited; for who does not see all ranks.
        on_gpu: whether they compute on GPUs.
    """
    there = [view for view in views if view.state not in (GONE, LEFT)]
    if not there:
        return None
    stopped = [v for v in there if v.state == STOPPED and v.silence > hang_sec]
    if stopped:
        return _verdict(_first(stopped))
    gone = [view for view in views if view.state in (GONE, LEFT)]
    in_vain = on_gpu and any(view.gone_sec > GONE_SEC for view in gone)
    working = [v for v in there if not (v.waits or (in_vain and v.phase in BESIDE_SUMS))]
    if working:
        over = [view for view in working if view.silence > view.limit]
        last = min(working, key=lambda v: v.place)
        if not over or (last not in over and last.place < min(v.place for v in over)):
            return None
        return _verdict(_first(over))
    if any(
        v.silence <= (GONE_SEC if in_vain else max(all_wait_sec, ALL_WAIT * v.limit)) for v in there
    ):
        return None
    return _all_wait(there, gone, lost)


def _first(views: Sequence[View]) -> list[View]:
    return sorted(views, key=lambda v: (v.place, -v.silence))


def _verdict(culprits: list[View]) -> Verdict:
    first = culprits[0]
    text = f"rank {first.rank} on {first.host} hangs: {told(first)}"
    if len(culprits) > 1:
        text += f"; also rank {', '.join(str(v.rank) for v in culprits[1:])}"
    return Verdict(tuple(v.rank for v in culprits), first.rank, first.step, text)


def _all_wait(there: list[View], gone: Sequence[View], lost: Sequence[str]) -> Verdict:
    """Say what is wrong when every rank waits for the others."""
    behind = _first(there)
    calls = {(v.calls, v.call, v.values) for v in there}
    if lost:
        cause = f"{', '.join(lost)} is not heard of: its network or the machine is down"
    elif gone:
        who = ", ".join(f"rank {v.rank} on {v.host}" for v in gone)
        cause = f"they wait for {who}, which has ended"
    elif len(calls) > 1:
        cause = "they call different ones: a rank skipped one, or called one that others do not"
    else:
        cause = "they call the same one: the network between them is cut, or it hangs by itself"
    ranks = "; ".join(f"rank {v.rank}: {told(v)}, {_called(v)}" for v in behind)
    return Verdict(
        (), behind[0].rank, behind[0].step, f"all ranks wait in collectives: {cause}. {ranks}"
    )


def _called(view: View) -> str:
    of = f" of {view.values} values" if view.values else ""
    return f"in its collective {view.calls}: {CALLS[view.call]}{of}"


def told(view: View) -> str:
    """Return one rank's place and silence in words."""
    doing = f"waits for other ranks in {PHASES[view.phase]}" if view.waits else PHASES[view.phase]
    state = "" if view.state in "RSD" else f", {MEANING.get(view.state, view.state)}"
    if view.state == "D":
        state = f", {MEANING['D']}"
    return f"{doing} at step {view.step}, no heartbeat for {view.silence:.1f} s{state}"


def waits_for_others(phase: int, waits: int, *, on_gpu: bool) -> bool:
    """Say whether a rank is in a collective.

    On a GPU a collective returns at once and the rank waits where it first reads a result: all of
    the phase counts.
    """
    return bool(waits) or (on_gpu and phase == NUMBER_OF["all-reduce"])
