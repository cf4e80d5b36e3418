"""The report as one self-contained HTML page, and its figure as a PNG. Needs matplotlib."""

import html
import io
import json
from pathlib import Path
from typing import Any

from dist_train.bench.breakdown import MEANS, PARTS
from dist_train.bench.report import as_text
from dist_train.config import ConfigError

# Okabe and Ito's colours, told apart with any colour vision; grey is what is not explained.
COLOURS = {
    "data": "#E69F00",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#009E73",
    "host": "#F0E442",
    "waiting": "#CC79A7",
    "all_reduce": "#D55E00",
    "residual": "#BBBBBB",
}
LINES = {"strong": ("#0072B2", "o"), "weak": ("#D55E00", "s")}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}pre{background:#f5f5f5;padding:1rem;overflow-x:auto;font-size:.85rem}"
    "figure{margin:1.5rem 0}svg{max-width:100%;height:auto}.first{border-left:4px solid #0072B2;"
    "padding:.3rem 1rem;background:#eef5fa}"
)


def check_matplotlib() -> None:
    """Raise ConfigError if there is no matplotlib: before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--page needs matplotlib, which is not installed: pip install 'dist-train[bench]'"
        ) from None


def write_page(report: dict[str, Any], path: Path) -> list[Path]:
    """Write the page to `path`, and its figure beside it as PNG; returns both paths."""
    figure = _figure(report)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    vector = drawn.getvalue()
    path.write_text(_html(report, vector[vector.index("<svg") :]), encoding="utf-8")
    return [path, picture]


def _figure(report: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    setups = report["setups"]
    with_parts = [r for r in setups if r["parts_sec"] is not None]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    for scaling, (colour, marker) in LINES.items():
        curve = sorted(
            (r for r in setups if scaling in r["scalings"]), key=lambda r: r["num_ranks"]
        )
        if curve:
            _draw_curve(left, middle, curve, scaling, colour, marker)
    counts = sorted({r["num_ranks"] for r in setups})
    for axes, title in ((left, "images/s"), (middle, "efficiency")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("ranks")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.legend(frameon=False)
    middle.set_ylim(0, 1.15)
    middle.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if with_parts:
        _draw_parts(right, with_parts)
    return figure


def _draw_curve(
    rates: Any, shares: Any, curve: list[dict[str, Any]], scaling: str, colour: str, marker: str
) -> None:
    counts = [r["num_ranks"] for r in curve]
    for axes, estimates in (
        (rates, [r["images_per_sec"] for r in curve]),
        (shares, [r["efficiency"][scaling] for r in curve]),
    ):
        values = [e["value"] for e in estimates]
        spread = [
            [e["value"] - (e["low"] if e["low"] is not None else e["value"]) for e in estimates],
            [(e["high"] if e["high"] is not None else e["value"]) - e["value"] for e in estimates],
        ]
        axes.errorbar(counts, values, spread, color=colour, marker=marker, capsize=3, label=scaling)
    first = curve[0]["images_per_sec"]["value"] / counts[0]
    ideal = f"{scaling}, ideal"
    rates.plot(counts, [first * n for n in counts], color=colour, ls=":", label=ideal)


def _draw_parts(axes: Any, setups: list[dict[str, Any]]) -> None:
    names = [f"{r['num_ranks']} x {r['batch_size']}" for r in setups]
    bars = [_bars(r["parts_sec"]) for r in setups]
    for part in PARTS:
        starts, widths = ([1000 * bar[part][i] for bar in bars] for i in range(2))
        axes.barh(names, widths, left=starts, color=COLOURS[part], label=MEANS[part], height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    title = "where the time goes (ranks x batch of a rank)"
    if any(width < 0 for bar in bars for _, width in bar.values()):
        title += "\nleft of zero: what came out negative"
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _bars(parts_sec: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return (start, width) of each part, in seconds: the widths add up to the step.

    What came out negative, by noise or as what others count twice, goes from zero to the left.
    """
    ends = {True: 0.0, False: 0.0}  # of the bars above zero, and below
    found = {}
    for part in PARTS:
        sec = parts_sec[part]
        found[part] = (ends[sec >= 0], sec)
        ends[sec >= 0] += sec
    return found


def _html(report: dict[str, Any], drawing: str) -> str:
    advice = report["advice"]
    first = f'<p class="first">{html.escape(advice["text"])}</p>' if advice else ""
    data = html.escape(json.dumps(report, indent=1))
    title = f"{report['experiment']}: speed and scaling"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(report['created'])}, <code>{html.escape(report['command'])}</code></p>"
        f"{first}<figure>{drawing}</figure><pre>{html.escape(as_text(report))}</pre>"
        f"<details><summary>everything that was measured, as JSON</summary><pre>{data}</pre>"
        "</details></body></html>\n"
    )
