"""The report in the terminal. Imports no torch."""

from typing import Any

from dist_train.bench.breakdown import MEANS, PARTS, losses_of

NOISY = 0.2  # half of the interval of a step, as a share: nothing that is built on it is known


def as_text(report: dict[str, Any]) -> str:
    """Return the whole report as text."""
    machine, first = report["machine"], report["setups"][0]
    lines = [
        f"{report['experiment']} with {first['dataset']} on {machine['device']}, "
        f"{machine['cpu']}; torch {machine['torch']}, {first['precision']}, "
        f"{first['memory_format']}; {report['repeats']} launches of each, in turns",
        *([] if first["notice"] is None else [f"*** {first['notice']} ***"]),
        "",
    ]
    for scaling, title in (
        ("strong", "the same global batch on more ranks"),
        ("weak", "the same batch a rank on more ranks"),
    ):
        curve = [r for r in report["setups"] if scaling in r["scalings"]]
        if curve:
            lines += [f"{scaling} scaling: {title}", *_curve(curve, scaling), ""]
    lines += [_peaks(report["setups"]), ""]
    noisy = [r for r in report["setups"] if _doubt(r["step_sec"]) > NOISY]
    for r in noisy:
        lines += [
            f"*** the launches of {r['num_ranks']} x {r['batch_size']} differ too much for what "
            "follows to be trusted: repeat on an idle machine, or with --repeats ***",
            "",
        ]
    if any(r["parts_sec"] is not None for r in report["setups"]):
        lines += ["where the time of a step goes, ms (share)", *_breakdown(report["setups"]), ""]
    lines += _losses(report["setups"])
    if report["scale"] is not None:
        alone = all(r["num_ranks"] == 1 for r in report["setups"])
        lines += [*_scale(report["scale"], alone=alone), ""]
    unsteady = [r["num_ranks"] for r in report["setups"] if not r["steady"]]
    if unsteady:
        lines += [f"not steady within the time to warm up: {unsteady} ranks", ""]
    if report["advice"] is not None:
        lines += [f"change first: {report['advice']['text']}", ""]
    return "\n".join(lines)


def _curve(curve: list[dict[str, Any]], scaling: str) -> list[str]:
    head = ("ranks", "batch", "images/s", "step ms", "p90", "p99", "speed-up", "efficiency")
    rows = [
        (
            str(r["num_ranks"]),
            f"{r['global_batch_size']}",
            _with_half(r["images_per_sec"], 1, 0),
            _with_half(r["step_sec"], 1000, 2),
            f"{1000 * r['step_sec_p90']:.2f}",
            f"{1000 * r['step_sec_p99']:.2f}",
            _with_half(r["speedup"][scaling], 1, 2),
            f"{r['efficiency'][scaling]['value']:.0%}",
            f"{r['mfu']:.1%}",
            f"{r['memory_bytes'] / 2**30:.2f}",
        )
        for r in curve
    ]
    return _table((*head, "MFU", "GiB"), rows)


def _breakdown(setups: list[dict[str, Any]]) -> list[str]:
    shown = [r for r in setups if r["parts_sec"] is not None]
    head = ("", *(f"{r['num_ranks']} x {r['batch_size']}" for r in shown))
    rows = [
        (
            MEANS[part],
            *(
                f"{_with_its_half(r['parts_sec'][part], r['parts_half_sec'][part])} "
                f"({_share(r, part):.1%})"
                for r in shown
            ),
        )
        for part in PARTS
    ]
    rows.append(("together", *(f"{1000 * r['step_sec']['value']:.2f}" for r in shown)))
    return _table(head, rows)


def _losses(setups: list[dict[str, Any]]) -> list[str]:
    """Return what each part lost; the shares add up to what an efficiency lacks of 100 %."""
    losses = losses_of(setups)
    if not losses:
        return []

    def row(part: str) -> tuple[str, ...]:
        return MEANS[part], *(
            f"{_with_its_half(lost.sec[part], lost.half_sec[part], '+')} "
            f"({lost.sec[part] / lost.step_sec:+.1%})"
            for lost in losses
        )

    whole = [(sum(lost.sec.values()), lost.step_sec) for lost in losses]
    head = ("", *(lost.name for lost in losses))
    rows = [row(part) for part in PARTS]
    rows.append(("together", *(f"{1000 * sec:+.2f} ({sec / step:+.1%})" for sec, step in whole)))
    title = "why efficiency was lost: ms above those of as many samples on the fewest ranks (share)"
    return [title, *_table(head, rows), ""]


def _peaks(setups: list[dict[str, Any]]) -> str:
    """Say what MFU is a share of; on a CPU every setup has measured its own."""
    rates = sorted(r["peak_flops_per_sec"] / 1e12 for r in setups)
    least, most = f"{rates[0]:.3g}", f"{rates[-1]:.3g}"
    rate = most if least == most else f"{least} to {most}"
    return f"MFU: of {rate} TFLOP/s a rank ({setups[0]['peak_source']})"


def _scale(scale: dict[str, Any], *, alone: bool) -> list[str]:
    """Return the model of scale: its error here, and its efficiencies elsewhere.

    Args:
        scale: of the report.
        alone: no setup has more than one rank.
    """
    lines = ["predicted by the model of scale (weak scaling; see its error here):"]
    lines += [
        f"  here, {c['num_ranks']} x {c['batch_size']}: {1000 * c['predicted_sec']:.2f} ms, "
        f"measured {1000 * c['measured_sec']:.2f} ({c['error']:+.1%}); link: "
        f"{1e6 * c['latency_sec']:.0f} us, {c['bytes_per_sec'] / 1e9:.2f} GB/s; the slowest rank "
        f"{1000 * c['late_sec']:.2f} ms late, {1000 * c['predicted_late_sec']:.2f} as below"
        for c in scale["checked"]
    ]
    if not scale["checked"]:
        why = "takes longer the larger it is" if not alone else "one rank would need"
        lines.append(f"  here: no all-reduce was measured that {why}")
    counts = [count for count, _ in scale["networks"][0]["efficiency"]]
    head = ("efficiency of this step on ranks:", *(f"{count:,}" for count in counts))
    rows = [
        (network["name"], *(f"{share:.0%}" for _, share in network["efficiency"]))
        for network in scale["networks"]
    ]
    useful = scale["goodput"]
    rows.append(
        ("useful share of the time, with failures", *(f"{s:.1%}" for _, s in useful["shares"]))
    )
    return [
        *lines,
        *_table(head, rows),
        f"  (a failure of each GPU in {useful['mtbf_hours_of_one']:,.0f} hours; a save stalls "
        f"{1000 * useful['save_sec']:.1f} ms, a restart takes {useful['restart_sec']:.1f} s here)",
    ]


def _with_its_half(sec: float, half: float | None, sign: str = "") -> str:
    """Return milliseconds ± half of their interval."""
    text = f"{1000 * sec:{sign}.2f}"
    return text if half is None or half < 5e-6 else f"{text} ± {1000 * half:.2f}"


def _share(result: dict[str, Any], part: str) -> float:
    return result["parts_sec"][part] / result["step_sec"]["value"]


def _with_half(estimate: dict[str, float | None], factor: float, digits: int) -> str:
    """Return value ± half of its interval."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    assert value is not None
    text = f"{factor * value:,.{digits}f}"
    if low is None or high is None or high == low:
        return text
    if _doubt(estimate) > 1:
        return f"{text} ± over 100%"
    return f"{text} ± {factor * (high - low) / 2:,.{digits}f}"


def _doubt(estimate: dict[str, float | None]) -> float:
    """Return half of the interval as a share of the value; 0: not known."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None or low is None or high is None:
        return 0.0
    return (high - low) / 2 / value


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return lines with aligned columns; the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    ]
