"""The examination as a table, and as JSON."""

import json
import shutil
import textwrap
from dataclasses import asdict
from typing import Any

from dist_train.doctor.diagnosis import Facts
from dist_train.doctor.finding import Finding, Section

SCHEMA = 1
INDENT = 16
HEALTHY, PROBLEMS = 0, 1


def exit_code_of(sections: list[Section]) -> int:
    """Return 0 unless there is an error."""
    return PROBLEMS if _of_level(sections, "error") else HEALTHY


def as_text(facts: Facts, sections: list[Section]) -> str:
    """Return the table: section by section, and at the end what matters most."""
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    lines = [f"dist-train doctor: run folder {facts.run_dir}, {facts.sec:.0f} s"]
    for section in sections:
        lines += ["", section.title]
        for line in section.lines:
            lines += textwrap.wrap(line, width, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for finding in section.findings:
            lines += _wrapped(f"  {finding.level}", finding, width)
    errors, warnings = _of_level(sections, "error"), _of_level(sections, "warning")
    told = [_counted(errors, "problem"), _counted(warnings, "warning")]
    lines += ["", ", ".join(told) + (":" if errors or warnings else ": fit for a training")]
    for number, finding in enumerate([*errors, *warnings], 1):
        lines += _wrapped(f"  {number}. {finding.level}", finding, width)
    return "\n".join(lines) + "\n"


def as_json(facts: Facts, sections: list[Section]) -> str:
    """Return everything as one JSON object.

    `schema` (1), `exit_code`, `sections` (list of `title`, `lines`, `findings` with `level` and
    `text`), and `facts`: the fields of `dist_train.doctor.diagnosis.Facts`, whose records and
    units are those of the dataclasses named there; ranks as keys are text.
    """
    told: dict[str, Any] = {
        "schema": SCHEMA,
        "exit_code": exit_code_of(sections),
        "sections": [
            {"title": s.title, "lines": s.lines, "findings": [asdict(f) for f in s.findings]}
            for s in sections
        ],
        "facts": asdict(facts),
    }
    return json.dumps(told, indent=1) + "\n"


def _of_level(sections: list[Section], level: str) -> list[Finding]:
    return [finding for s in sections for finding in s.findings if finding.level == level]


def _counted(findings: list[Finding], word: str) -> str:
    return f"{len(findings)} {word}{'' if len(findings) == 1 else 's'}"


def _wrapped(head: str, finding: Finding, width: int) -> list[str]:
    return textwrap.wrap(
        finding.text,
        width,
        initial_indent=f"{head:<{INDENT}}",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
