"""Watch the ranks of one node until they have left, or until one hangs: then end the group.

Started by the node's first rank, in a session of its own and deaf to the signals that launchers
send: it outlives a stop until the ranks have saved, and never the ranks.
"""

import json
import mmap
import os
import select
import time
from typing import Any, BinaryIO, NamedTuple

from dist_train.heartbeat import HERE, LEFT, NOT_YET, NUMBER_OF, Identity, read_beat, read_identity
from dist_train.monitor.ending import await_end, end_ranks, report, report_death, within
from dist_train.monitor.limits import WRITING, Limits
from dist_train.monitor.link import Link, bound_socket, socket_to
from dist_train.monitor.processes import GONE, STOPPED, TRACED, CoreDelays, bytes_moved, state_of
from dist_train.monitor.report import Place, append_event, open_stacks, say
from dist_train.monitor.stragglers import Slow, Stragglers
from dist_train.monitor.verdict import LEFT as HAS_LEFT
from dist_train.monitor.verdict import Verdict, View, decide, waits_for_others

POLL_SEC = 0.2
LOOK_CLOSER_SEC = 1.0  # of silence, before /proc is asked for more than whether a rank lives
OTHERS_FIRST_SEC = 3.0  # for ranks whose culprit is on another node
TELL_SEC = 3.0  # of ranks on GPUs that died, to the monitors of other nodes
IN_COLLECTIVES = (NUMBER_OF["forward"], NUMBER_OF["backward"])  # SyncBatchNorm's, DDP's


class Settings(NamedTuple):
    """What the node's first rank tells its monitor."""

    slots: int
    launcher: str
    on_gpu: bool
    may_end: bool  # False: report only, somebody is at the terminal
    hang_sec: float
    start_sec: float
    step_sec: float
    secret: str
    hub: tuple[str, int] | None  # with several nodes: where rank 0's monitor listens
    is_hub: bool


class Monitor:
    """The heartbeats of one node, looked at five times a second."""

    def __init__(self, settings: Settings, place: Place, memory: int, hub: int | None) -> None:
        self._settings = settings
        self._place = place
        self._memory = mmap.mmap(memory, 0, prot=mmap.PROT_READ)
        self._limits: dict[int, Limits] = {}  # by slot
        self._gone: dict[int, float] = {}  # by slot: seconds since the process was first not there
        self._moved: dict[int, int] = {}  # bytes, by slot
        self._stacks: dict[int, BinaryIO | None] = {}  # by rank; read also after its death
        self._link = _open_link(settings, place, hub)
        self._stragglers = Stragglers()
        self._delays = CoreDelays()
        self._parent = os.getppid()
        self._everybody: list[View] = []  # with several nodes, as far as they are known
        self._dead: set[int] = set()  # ranks whose death is told
        self._told: tuple[int, int] | None = None  # report only: rank and step of the last one

    def run(self, wake: int) -> None:
        """Watch until all have left; end of file on `wake` ends a pause early."""
        waits_for: list[Any] = [wake, *([self._link] if self._link is not None else [])]
        last = time.monotonic()
        while True:
            ready, _, _ = select.select(waits_for, [], [], POLL_SEC)
            if wake in ready and not os.read(wake, 1):
                waits_for.remove(wake)
            now = time.monotonic()
            # More than two pauses: this process stood still itself, and maybe the whole machine.
            views = self._look(min(now - last, 2 * POLL_SEC))
            last = now
            self._note_deaths(views)
            if self._all_have_left(views):
                return
            verdict = self._judge(views)
            if verdict is not None and self._end(verdict, views):
                return

    def _ranks(self) -> list[Identity]:
        """Return who is here and has not left."""
        slots = (read_identity(self._memory, slot) for slot in range(self._settings.slots))
        return [one for one in slots if one.presence == HERE]

    def _look(self, tick_sec: float) -> list[View]:
        """Return what there is to see of the ranks of this node."""
        views, now = [], time.monotonic()
        for slot in range(self._settings.slots):
            one, beat = read_identity(self._memory, slot), read_beat(self._memory, slot)
            if one.presence == NOT_YET:
                continue
            process = state_of(one.pid, one.started)
            if process == GONE:
                self._gone[slot] = self._gone.get(slot, -tick_sec) + tick_sec
            state = HAS_LEFT if one.presence == LEFT else process
            if slot not in self._limits:
                self._stacks[one.rank] = open_stacks(one)
                s = self._settings
                self._limits[slot] = Limits(
                    hang_sec=s.hang_sec, start_sec=s.start_sec, step_sec=s.step_sec
                )
            limits = self._limits[slot]
            suspended = state == STOPPED and self._settings.launcher == "single"  # Ctrl-Z
            limits.look(beat, tick_sec, paused=suspended or state == TRACED)
            if beat.phase in WRITING and limits.silence > LOOK_CLOSER_SEC:
                moved = bytes_moved(one.pid)
                if moved != self._moved.get(slot, moved):
                    limits.move()
                self._moved[slot] = moved
            views.append(
                View(
                    rank=one.rank,
                    host=self._place.host,
                    phase=beat.phase,
                    step=beat.step,
                    waits=waits_for_others(beat.phase, beat.waits, on_gpu=self._settings.on_gpu),
                    silence=limits.silence,
                    limit=limits.limit,
                    state=state,
                    busy_ns=beat.busy_ns,
                    delay_ns=self._delays.of(one.pid, now),
                    calls=beat.calls,
                    call=beat.call,
                    values=beat.values,
                    gone_sec=self._gone.get(slot, 0.0),
                )
            )
        return views

    def _all_have_left(self, views: list[View]) -> bool:
        if len(views) < self._settings.slots and os.getppid() == self._parent:
            return False  # some are still on their way
        if not all(view.state in (HAS_LEFT, GONE) for view in views):
            return False
        dead = [view.gone_sec for view in views if view.state == GONE]
        several = self._link is not None and self._settings.on_gpu
        return not (several and dead and min(dead) < TELL_SEC)

    def _judge(self, views: list[View]) -> Verdict | None:
        """Decide here, or take the word of rank 0's node, which sees all."""
        s, link = self._settings, self._link
        if s.hub is None:
            self._name_slow(views)
            return decide(views, hang_sec=s.hang_sec, on_gpu=s.on_gpu)
        if link is None:
            return self._judge_alone(views, cut=False)
        link.exchange(views, self._place.host)
        if not s.is_hub:
            in_touch, verdict, cut = link.word_of_hub()
            self._everybody = link.everybody
            return verdict if in_touch else self._judge_alone(views, cut=cut)
        everybody = self._everybody = views + link.others()
        self._name_slow(everybody)
        lost = link.lost()
        if link.num_nodes_heard() < self._place.nodes - 1:
            return self._judge_alone(everybody, cut=bool(lost))
        verdict = decide(everybody, hang_sec=s.hang_sec, lost=lost, on_gpu=s.on_gpu)
        if verdict is not None:
            link.exchange(everybody, self._place.host, verdict)
        return verdict

    def _judge_alone(self, views: list[View], *, cut: bool) -> Verdict | None:
        """Decide without knowing what ranks on other nodes do.

        `cut`: their monitor was heard of and is not any more, so the network is to blame. Without
        it, who may wait for them is given as long as a collective may take.
        """
        s = self._settings
        if cut:
            return decide(views, hang_sec=s.hang_sec, lost=["another node"])
        may_wait = [v._replace(waits=v.waits or v.phase in IN_COLLECTIVES) for v in views]
        return decide(may_wait, hang_sec=s.hang_sec, all_wait_sec=s.step_sec)

    def _note_deaths(self, views: list[View]) -> None:
        """Record ranks that ended without leaving: killed, or crashed in C; with their stacks."""
        dead = [view for view in views if view.state == GONE and view.rank not in self._dead]
        for view in dead:
            self._dead.add(view.rank)
            report_death(view, self._stacks[view.rank], self._place)

    def _name_slow(self, views: list[View]) -> None:
        for slow in self._stragglers.look(views, time.monotonic()):
            text = _told(slow)
            say(f"*** {text} ***")
            details = {"factor": round(slow.factor, 2), "reason": text}
            within(
                POLL_SEC,
                lambda s=slow, d=details: append_event(
                    self._place, "straggler", step=s.step, rank=s.rank, **d
                ),
            )

    def _end(self, verdict: Verdict, views: list[View]) -> bool:
        """Report, and end the ranks; returns False if the watch goes on."""
        ranks, s = self._ranks(), self._settings
        views = self._everybody or views
        if not s.may_end:
            if self._told != (verdict.rank, verdict.step):
                self._told = verdict.rank, verdict.step
                report(verdict, views, ranks, self._stacks, self._place, ends=False)
            return False
        report(verdict, views, ranks, self._stacks, self._place, ends=True)
        if verdict.culprits and not set(verdict.culprits) & {one.rank for one in ranks}:
            await_end(ranks, OTHERS_FIRST_SEC)  # another node's monitor kills the culprit
        end_ranks(ranks, verdict.culprits)
        return True


def main() -> None:
    """Read the settings from standard input and watch; its end of file wakes the watch up."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 65536)
        if not piece:
            return  # who started this is gone already
        line += piece
    told = json.loads(line)
    settings = Settings(**told["settings"])
    Monitor(settings, Place(**told["place"]), told["memory"], told["hub"]).run(0)


def _open_link(settings: Settings, place: Place, hub: int | None) -> Link | None:
    if settings.hub is None:
        return None
    try:
        link = bound_socket(hub) if hub is not None else socket_to(*settings.hub)
    except OSError:
        return None  # no such host: each node judges by what it sees
    return Link(link, node=place.node, is_hub=settings.is_hub, secret=settings.secret)


def _told(slow: Slow) -> str:
    return (
        f"rank {slow.rank} on {slow.host} is slow: it works {1e3 * slow.busy_sec:.1f} ms a step, "
        f"the others {1e3 * slow.others_sec:.1f} ms ({slow.factor:.1f} times), and a step takes "
        f"{1e3 * slow.step_sec:.1f} ms (seen at step {slow.step})"
    )
