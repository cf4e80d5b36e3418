"""The tables: in every cell each loop against the plain one, the fastest by hand, and ours.

All comparisons are paired by round: what else the machine does in a round meets all loops alike.
"""

import math
from collections import Counter
from collections.abc import Sequence

from benchmarks.peers.job import CASES
from benchmarks.peers.records import STYLES, Cell, Record, judged, newest_series
from benchmarks.peers.worker import PEERS
from dist_train.bench.intervals import Estimate, geometric_mean_of, mean_of

HEAD = (
    "loop",
    "CPU us a step",
    "over plain",
    "over the fastest",
    "ours over it",
    "images/s, times plain's",
    "first step after, times plain's",
    "peak memory, times plain's",
)
EXPLAINED = (
    "In a round every loop is started once, by itself, 1 rank as a plain process, 2 under "
    "torchrun; then they take turns of {turn} steps, {turns} each, in a new order every time. "
    "Lean: no log, bar or checkpoint; default: what each does by itself. CPU time and memory are "
    "means over the ranks, with their child processes (ours: {watchdog}), without torchrun's own. "
    "Differences and ratios are of the same round, with their 95 % intervals; ours is ahead or "
    "behind where that leaves out zero. Every loop ends with the fastest one's weights, bit for "
    "bit; the plain one, whose optimizer is not fused, with their norm to 0.1 %. The fastest loop "
    "leaves what lives out of garbage collections (gc.freeze), as ours does. Ours also has glibc "
    "keep freed memory (mallopt); no other loop does."
)


def make_tables(records: Sequence[Record]) -> dict[str, str]:
    """Return the Markdown of each case."""
    cases = dict.fromkeys(r.cell.case for r in records)
    return {case: _tables_of([r for r in records if r.cell.case == case]) for case in cases}


def difference(here: Sequence[Record], peer: str, base: str, key: str) -> Estimate | None:
    """Return the mean of peer's value - base's; None: no round has both."""
    pairs = paired(here, peer, base, key)
    return mean_of([mine - theirs for mine, theirs in pairs]) if pairs else None


def ratio(here: Sequence[Record], peer: str, base: str, key: str) -> Estimate | None:
    """Return the geometric mean of peer's value / base's; None: no round has both."""
    pairs = paired(here, peer, base, key)
    return geometric_mean_of([mine / theirs for mine, theirs in pairs]) if pairs else None


def paired(here: Sequence[Record], peer: str, base: str, key: str) -> list[tuple[float, float]]:
    """Return the values of two different loops in every round of a cell that both finished."""
    mine, theirs = _by_round(here, peer, key), _by_round(here, base, key)
    return [(mine[n], theirs[n]) for n in mine if n in theirs] if peer != base else []


def _tables_of(records: Sequence[Record]) -> str:
    """Return the tables of one case, each style from the newest series that measured it."""
    lines: list[str] = []
    for style in STYLES:
        measured = newest_series([r for r in records if r.cell.style == style])
        if measured:
            lines += _lines_of_style(judged(measured), explained=bool(lines))
    return "\n".join(lines)


def _lines_of_style(kept: Sequence[Record], *, explained: bool) -> list[str]:
    dates = " to ".join(dict.fromkeys((kept[0].date, kept[-1].date)))
    about = ", ".join(f"{name} {value}" for name, value in kept[0].surroundings.items())
    first = kept[0].cell
    lines = [f"{first.case} net, {first.style}, {dates}; {about}.", ""]
    if not explained:
        children, case = _mean(kept, "ours", "children_us"), CASES[first.case]
        watchdog = "its watchdog" if children is None else f"its watchdog, {children:.0f} us a step"
        lines += [EXPLAINED.format(watchdog=watchdog, turn=case.turn, turns=case.turns), ""]
    for cell in sorted({r.cell for r in kept}):
        lines += [*_lines_of(cell, [r for r in kept if r.cell == cell]), ""]
    return lines


def _lines_of(cell: Cell, here: Sequence[Record]) -> list[str]:
    """Return the table of one cell, and how far ours is behind plain at its first step."""
    peers = [peer for peer in PEERS if any(r.peer == peer for r in here)]
    ranks, rounds = cell.ranks, len({r.round for r in here})
    return [
        f"**{ranks} rank{'s' if ranks > 1 else ''}, {cell.precision}, {cell.style}**, "
        f"{rounds} round{'s' if rounds > 1 else ''}:",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---" * len(HEAD) + "|",
        *(f"| {' | '.join(_row(here, peer))} |" for peer in peers),
        *_first_step(here),
    ]


def _row(here: Sequence[Record], peer: str) -> list[str]:
    cpu_us = _mean(here, peer, "cpu_us")
    ours = difference(here, "ours", peer, "cpu_us")
    return [
        peer + _failures(here, peer),
        "" if cpu_us is None else f"{cpu_us:,.0f}",
        _plus_minus(difference(here, peer, "plain", "cpu_us")),
        _plus_minus(difference(here, peer, "fast", "cpu_us")),
        _plus_minus(ours) + _verdict(ours),
        _times_plain(here, peer, "images_per_sec", "{:,.0f} images/s"),
        _times_plain(here, peer, "first_step_sec", "{:.2f} s"),
        _times_plain(here, peer, "peak_rss_mib", "{:.0f} MiB"),
    ]


def _first_step(here: Sequence[Record]) -> list[str]:
    whole = difference(here, "ours", "plain", "first_step_sec")
    apart = difference(here, "ours", "plain", "first_step_apart_sec")
    thrown_away_sec = _mean(here, "ours", "throw_away_sec")
    if whole is None or thrown_away_sec is None:
        return []
    return [
        "",
        f"From the command to the end of the first step, ours over plain: "
        f"{_plus_minus(whole, digits=2)} s; without its throw-away step of "
        f"{thrown_away_sec:.2f} s: {_plus_minus(apart, digits=2)} s.",
    ]


def _failures(here: Sequence[Record], peer: str) -> str:
    mine = [r.outcome.failed for r in here if r.peer == peer]
    reasons = Counter(reason for reason in mine if reason is not None)
    return "".join(
        f"; failed in {count} of {len(mine)} rounds: {' '.join(reason.replace('|', '/').split())}"
        for reason, count in reasons.items()
    )


def _times_plain(here: Sequence[Record], peer: str, key: str, unit: str) -> str:
    """Return the ratio to the plain loop; its own mean in the plain loop's row."""
    if peer == "plain":
        mean = _mean(here, peer, key)
        return "" if mean is None else unit.format(mean)
    found = ratio(here, peer, "plain", key)
    if found is None:
        return ""
    if math.isinf(found.high):
        return f"{found.value:.3f}, once"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _plus_minus(found: Estimate | None, digits: int = 0) -> str:
    if found is None:
        return ""
    value = f"{found.value:+,.{digits}f}"
    if math.isinf(found.high):
        return f"{value}, once"
    return f"{value} +- {found.high - found.value:,.{digits}f}"


def _verdict(ours: Estimate | None) -> str:
    if ours is None or ours.low <= 0 <= ours.high:
        return ""
    return ", ahead" if ours.high < 0 else ", behind"


def _mean(here: Sequence[Record], peer: str, key: str) -> float | None:
    values = [r.outcome.values[key] for r in here if r.peer == peer and r.outcome.failed is None]
    return mean_of(values).value if values else None


def _by_round(here: Sequence[Record], peer: str, key: str) -> dict[int, float]:
    return {
        r.round: r.outcome.values[key] for r in here if r.peer == peer and r.outcome.failed is None
    }
