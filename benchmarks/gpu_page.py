"""The page of `make gpu-check`: every line says what was found, or why it was not."""

from collections import Counter
from typing import Any

WIDTH = 18
SHOWN_BYTES = (4, 1 << 20, 256 << 20, 1 << 30)  # of the all-reduces


def page(found: dict[str, Any]) -> str:
    """Return the page: one line a figure."""
    machine = found["machine"]
    gpus = ", ".join(f"{count} x {name}" for name, count in Counter(machine["gpus"]).items())
    lines = [
        f"gpu-check of {found['date']}, {found['wall_sec'] / 60:.1f} minutes",
        _line("GPUs", gpus),
        _line(
            "software",
            f"driver {machine['driver']}, torch {machine['torch']}, CUDA {machine['cuda']}, NCCL "
            f"{machine['nccl']}; {machine['cores']} CPU cores",
        ),
    ]
    for name, show in SHOWN.items():
        part = found[name]
        for key in ("left_out", "error"):
            if key in part:
                lines.append(
                    _line(name, f"{'NOT DONE' if key == 'error' else 'left out'}: {part[key]}")
                )
        if len(part.keys() - {"left_out", "error", "wall_sec"}) > 0:
            lines += show(part)
    return "\n".join(lines)


def _tests(part: dict[str, Any]) -> list[str]:
    lines = [_line("tests", f"{part['passed']} passed, {len(part['failed'])} failed")]
    return lines + [_line("  failed", name) for name in part["failed"]]


def _nccl(part: dict[str, Any]) -> list[str]:
    lines = []
    for row in part["reductions"]:
        if row["num_bytes"] in SHOWN_BYTES:
            size = row["num_bytes"]
            speed = f", {row['bus_bytes_per_sec'] / 1e9:.1f} GB/s a GPU" if size > 1024 else ""
            lines.append(_line("all-reduce", f"{_size(size)}: {1e6 * row['sec']:,.0f} us{speed}"))
    used = ", ".join(f"{name} ({count} channels)" for name, count in part["transports"].items())
    return [*lines, _line("NCCL uses", used or "not told")]


def _steps(part: dict[str, Any]) -> list[str]:
    times, ratios, waits = part["step_ms"], part["ratio"], part["waits"]
    lines = [
        _line(
            "step", f"{part['net']}, {part['images_a_gpu']} images a GPU, {part['world_size']} GPUs"
        ),
        *(
            _line(f"  {name}", f"{times[name]:.2f} ms" + _against(ratios.get(name)))
            for name in times
        ),
        _line("host waits", ", ".join(f"{name}: {count} a step" for name, count in waits.items())),
        _line("form in force", part["form"]),
    ]
    if part["ddp_recovers"] is not None:
        word = "are taken back" if part["ddp_recovers"] else "END THE ATTEMPT"
        lines.append(_line("DDP", f"failures inside a step {word}"))
    return lines


def _speed(part: dict[str, Any]) -> list[str]:
    text = f"{part['train_sec']:.2f} s for {part['steps']} steps, {part['precision']}, "
    text += f"{100 * part['eval_accuracy']:.2f} % on {part['dataset']}"
    return [_line("cifar10_speed", text)]


def _rates(part: dict[str, Any]) -> list[str]:
    lines = []
    for preset, runs in part.items():
        if preset == "wall_sec":
            continue
        alone = runs["1"]["images_per_sec"]
        for count, run in runs.items():
            times = run["images_per_sec"] / alone
            text = f"{run['images_per_sec']:,.0f} images/s, {run['precision']}, {count} GPU"
            if int(count) > 1:
                text += f"s: {times:.2f} times one ({times / int(count):.0%})"
            lines.append(_line(preset, text))
    return lines


SHOWN = {"tests": _tests, "nccl": _nccl, "steps": _steps, "speed": _speed, "rates": _rates}


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}} {text}"


def _against(ratio: list[float] | None) -> str:
    if ratio is None:
        return ""
    mean, half = ratio
    return f", {100 * (mean - 1):+.2f} +- {100 * half:.2f} %"


def _size(num_bytes: int) -> str:
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:g} {name}"
    return f"{num_bytes} bytes"
