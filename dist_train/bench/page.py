"""The report as one self-contained HTML page, and its figure as a PNG. Needs matplotlib."""

import html
import io
import json
import textwrap
from pathlib import Path
from typing import Any

from dist_train.bench.breakdown import MEANS, PARTS, losses_of
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
NETWORK_LINES = (("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"))  # as in scale.NETWORKS
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
            "--page needs matplotlib, which is not installed: pip install matplotlib"
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
    """Draw a panel for each thing that was measured, in one row or two."""
    from matplotlib.figure import Figure

    setups, scale = report["setups"], report["scale"]
    parts = [
        (f"{r['num_ranks']} x {r['batch_size']}", r["parts_sec"])
        for r in setups
        if r["parts_sec"] is not None
    ]
    losses = [(f"{lost.name}\n{_residual(lost.sec)}", lost.sec) for lost in losses_of(setups)]
    panels = [["rates", "shares", "predicted"] if scale else ["rates", "shares"]]
    heights = [4.4]
    if parts:
        panels.append(["parts", "lost"] if losses else ["parts"])
        heights.append(2.0 + 0.45 * max(len(parts), len(losses)))
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes: dict[str, Any] = {}
    for row, names in zip(rows, panels, strict=True):
        axes |= row.subplot_mosaic([names])
    _draw_measured(axes["rates"], axes["shares"], setups)
    if scale:
        _draw_predicted(axes["predicted"], scale)
    if parts:
        _draw_bars(axes["parts"], parts, "where the time goes (ranks x batch of a rank)")
        handles, labels = axes["parts"].get_legend_handles_labels()
        rows[1].legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    if losses:
        title = "why efficiency was lost:\nms above those of as many samples on the fewest ranks"
        _draw_bars(axes["lost"], losses, title)
    return figure


def _residual(lost: dict[str, float]) -> str:
    return f"{MEANS['residual']}: {1000 * lost['residual']:+.2f} ms"


def _draw_measured(rates: Any, shares: Any, setups: list[dict[str, Any]]) -> None:
    for scaling, (colour, marker) in LINES.items():
        curve = sorted(
            (r for r in setups if scaling in r["scalings"]), key=lambda r: r["num_ranks"]
        )
        if curve:
            _draw_curve(rates, shares, curve, scaling, colour, marker)
    counts = sorted({r["num_ranks"] for r in setups})
    _prepare(rates, "images/s", counts)
    rates.set_yscale("log")
    _label_in_full(rates)
    rates.legend(frameon=False)
    _prepare_shares(shares, "efficiency", counts)
    shares.legend(frameon=False, loc="lower left")


def _label_in_full(axes: Any) -> None:
    """Write the numbers of a logarithmic axis as they are: 4,000 and not 4 x 10^3."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    if high > 1000 * low:
        locator = LogLocator()
    elif high > 5 * low:  # so that 1, 2, 5 times powers of ten are two ticks at least
        locator = LogLocator(subs=(1, 2, 5))
    else:
        locator = MaxNLocator(5)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")


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


def _draw_predicted(axes: Any, scale: dict[str, Any]) -> None:
    """Draw what the model of scale says, and write how wrong it was where it was measured."""
    for network, (colour, marker) in zip(scale["networks"], NETWORK_LINES, strict=True):
        counts, shares = zip(*network["efficiency"], strict=True)
        axes.plot(counts, shares, color=colour, marker=marker, label=network["name"])
    errors = [f"{c['num_ranks']} x {c['batch_size']}: {c['error']:+.1%}" for c in scale["checked"]]
    whole = [error.replace(" ", "\xa0") for error in errors]  # no line ends within one
    told = f"error of the step here, {', '.join(whole)}" if errors else "error: not measured"
    title = f"efficiency as the model of scale predicts it\n{textwrap.fill(told, 52)}"
    counts = [count for count, _ in scale["networks"][0]["efficiency"]]
    _prepare_shares(axes, title, counts)
    axes.legend(frameon=False, loc="lower left", fontsize=8)


def _prepare_shares(axes: Any, title: str, counts: list[int]) -> None:
    _prepare(axes, title, counts)
    axes.axhline(1.0, color="#222222", ls=":", label="ideal")
    axes.set_ylim(0, 1.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _prepare(axes: Any, title: str, counts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, rows: list[tuple[str, dict[str, float]]], title: str) -> None:
    """Draw a bar for each (name, seconds by part)."""
    names = [name for name, _ in rows]
    bars = [_bars(parts_sec) for _, parts_sec in rows]
    for part in PARTS:
        starts, widths = ([1000 * bar[part][i] for bar in bars] for i in range(2))
        axes.barh(names, widths, left=starts, color=COLOURS[part], label=MEANS[part], height=0.6)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    if any(width < 0 for bar in bars for _, width in bar.values()):
        title += "\nleft of zero: what came out negative"
    axes.set_title(title, fontsize=10)


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
