"""What a check finds, and how numbers and names are told in its sentence."""

import statistics
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "note", "not checked", "warning", "error"]
NAMES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence: the values, and what to do."""

    level: Level
    text: str


@dataclass(kw_only=True, slots=True)
class Section:
    """What is looked at together: lines of what was measured, and what was found."""

    title: str
    lines: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    _places: dict[tuple[Level, str], tuple[int, list[str]]] = field(default_factory=dict)

    def error(self, text: str, *, node: str | None = None) -> None:
        """Add what keeps a training from working, or costs half its speed or more.

        Of many nodes the same is said once: `{nodes}` in the text stands for them.
        """
        self._add("error", text, node)

    def warning(self, text: str, *, node: str | None = None) -> None:
        """Add what makes it slower, or may end it some day."""
        self._add("warning", text, node)

    def note(self, text: str, *, node: str | None = None) -> None:
        """Add what is good to know."""
        self._add("note", text, node)

    def unchecked(self, text: str) -> None:
        """Add what could not be looked at, and why."""
        self._add("not checked", text, None)

    def fine_if_nothing(self, text: str) -> "Section":
        """Say that all is well, unless a problem was added; returns itself."""
        if not any(finding.level in ("error", "warning") for finding in self.findings):
            self.findings.insert(0, Finding("ok", text))
        return self

    def _add(self, level: Level, text: str, node: str | None) -> None:
        place, nodes = self._places.setdefault((level, text), (len(self.findings), []))
        if node is not None:
            nodes.append(node)
        told = Finding(level, text.replace("{nodes}", listed(nodes)))
        if place == len(self.findings):
            self.findings.append(told)
        else:
            self.findings[place] = told


def listed(names: Iterable[object]) -> str:
    """Return `a, b and c`; of many the first ones."""
    words = [str(name) for name in names]
    if len(words) > NAMES_SHOWN:
        words = [*words[: NAMES_SHOWN - 1], f"{len(words) - NAMES_SHOWN + 1} more"]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "none"


def counted(things: int | Sized, word: str) -> str:
    """Return `1 node`, or `3 nodes`."""
    number = things if isinstance(things, int) else len(things)
    return f"{number} {word}{'' if number == 1 else 's'}"


def ranks_of(ranks: Iterable[int]) -> str:
    """Return `rank 3`, or `ranks 2 and 3`."""
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


def size_of(num_bytes: float) -> str:
    """Return an amount of bytes in the unit that suits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def time_of(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def share_of_others(values: Mapping[str, float]) -> dict[str, float]:
    """Return each value divided by the median of the other ones; {} if there are none."""
    if len(values) < 2:
        return {}
    others = {name: [v for n, v in values.items() if n != name] for name in values}
    return {name: value / statistics.median(others[name]) for name, value in values.items()}
