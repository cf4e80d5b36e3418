"""The table of the campaign in the README, made from the results that are committed."""

from pathlib import Path

from benchmarks.reliability import results
from benchmarks.reliability.registry import ROWS
from benchmarks.reliability.results import Standing
from benchmarks.reliability.row import Row

README = results.ROOT / "README.md"
BEGIN = "<!-- reliability: made by `python -m benchmarks.reliability table --write` -->"
END = "<!-- reliability: end -->"
HEAD = ("id", "promise", "n/N", "at least", "seconds p50 / p95", "code", "state")


def make_table(folder: Path = results.FOLDER) -> str:
    """Return the table as Markdown: every row, whatever its state."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---|---|---|---|---|"]
    reasons = []
    for row in ROWS:
        standing = results.standing(results.read(folder, row.id))
        lines.append(f"| {' | '.join(cells(row, standing))} |")
        if standing.reasons:
            more = f" (and {len(standing.reasons) - 1} more)" if len(standing.reasons) > 1 else ""
            reasons.append(f"- {row.id} fails: {_escaped(standing.reasons[0])}{more}")
    if reasons:
        lines += ["", *reasons]
    return "\n".join(lines)


def cells(row: Row, standing: Standing) -> tuple[str, ...]:
    """Return what the table says of a row."""
    if row.work is None:
        state = f"NOT RUN: needs {row.needs}" if row.needs else "NOT BUILT"
        return (row.id, row.promise, "", "", "", "", state)
    if standing.num_seeds == 0:
        state = f"NOT RUN: needs {row.needs}" if row.needs else "NOT RUN yet"
        return (row.id, row.promise, f"0/{row.num_trials * row.faults:,}", "", "", "", state)
    seconds = ""
    if standing.sec:
        middle, late = results.quantile(standing.sec, 0.5), results.quantile(standing.sec, 0.95)
        seconds = f"{middle:.1f} / {late:.1f} {row.measures}"
    if standing.num_passed < standing.num_seeds:
        state = f"**FAILS** {standing.num_seeds - standing.num_passed} of {standing.num_seeds}"
    elif standing.num_seeds < row.num_trials:
        state = f"passes so far, {standing.num_seeds} of {row.num_trials} trials done"
    else:
        state = "passes"
    if not row.promised:
        told = f"NOT PROMISED{_extra(standing)}"
        return (row.id, row.promise, "", "", "", seen_at(standing), told)
    return (
        row.id,
        row.promise,
        f"{standing.faults_survived:,}/{standing.faults:,}",
        f"{standing.bound:.1%}",
        seconds,
        seen_at(standing),
        f"{state}{_extra(standing)}",
    )


def seen_at(standing: Standing) -> str:
    """Return the commits whose code the trials ran."""
    return f"{standing.commits[-1]}{' and older' if len(standing.commits) > 1 else ''}"


def _extra(standing: Standing) -> str:
    """Return what a trial adds: the share of useful time, or of faults without a promise."""
    shares = [note["ettr"] for note in standing.notes if "ettr" in note]
    told = [f"useful time {shares[-1]:.1%}"] if shares else []
    kinds: dict[str, list[bool]] = {}
    for note in standing.notes:
        if "noticed" in note:
            kinds.setdefault(note.get("kind", "faults"), []).append(note["noticed"])
    told += [f"{kind}: noticed {sum(seen)} of {len(seen)}" for kind, seen in kinds.items()]
    return "".join(f"; {text}" for text in told)


def _escaped(text: str) -> str:
    """Return one line of plain text for Markdown, without the paths of a machine."""
    words = [w if not w.startswith("/") else "PATH" for w in text.split()]
    return " ".join(words).replace("|", "/").replace("<", "(").replace(">", ")")[:200]


def table_in(readme: str) -> str:
    """Return the table that a README holds."""
    return readme.split(BEGIN)[1].split(END)[0].strip()


def write_table(path: Path = README) -> None:
    """Put the table between the markers of the README."""
    text = path.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{make_table()}\n\n{END}{tail}")
