"""`dist-train replay FILE`: run a saved batch again and see where it stops being finite."""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dist_train.attribution import first_non_finite, load_bad_batch
from dist_train.buffers import Buffers
from dist_train.build import autocast, emulation_notice
from dist_train.config import Config, ConfigError
from dist_train.config.arguments import Parser, print_error
from dist_train.config.compose import compose
from dist_train.config.importing import import_callable
from dist_train.data.batch import Batch
from dist_train.memory_format import laid_out, lay_out
from dist_train.order import seed_of
from dist_train.tasks import classification as task
from dist_train.weights import load_weights


def main(argv: list[str]) -> int:
    """Run the verb; returns 0 if the place was found again, 1 if not, 2 the user's mistake."""
    parser = Parser(prog="dist-train replay", description="Run a saved batch again.")
    parser.add_argument("file", type=Path, help="RUN/bad_batches/step_..._rank....pt")
    parser.add_argument(
        "--anomaly", action="store_true", help="with autograd's anomaly mode: which line did it"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda as in the run")
    try:
        options = parser.parse_args(argv)
        text, found = replay(options)
    except ConfigError as mistake:
        print_error(str(mistake))
        return 2
    sys.stdout.write(text + "\n")
    return 0 if found else 1


def replay(options: argparse.Namespace) -> tuple[str, bool]:
    """Return what to print, and whether something that is not finite was found.

    Raises:
        ConfigError: the file cannot be read, or its model cannot be made.
    """
    try:
        part, weights, context = load_bad_batch(options.file)
    except Exception as error:  # whatever the unpickler meets in bytes of unknown origin
        raise ConfigError(f"{options.file} cannot be read as a saved batch: {error}") from None
    device = torch.device(options.device)
    config = _config_of(context["config"])
    factory = import_callable(config.model.factory, "model.factory")
    module = factory(num_classes=context["num_classes"], **config.model.args)
    load_weights(module, Buffers(module), weights)
    form = context.get("memory_format", "channels_last")  # older files have no other
    lay_out(module.to(device).train(), form)
    part = Batch(
        images=laid_out(part.images.to(device), form),
        labels=part.labels.to(device),
        partner_labels=None if part.partner_labels is None else part.partner_labels.to(device),
        own_weight=None if part.own_weight is None else part.own_weight.to(device),
        first_position=part.first_position,
        global_size=part.global_size,
    )

    def loss_of_piece() -> Tensor:
        place = (config.seed, context["generation"], context["step"], part.first_position)
        torch.manual_seed(seed_of(*place))
        with autocast(context["precision"], device):
            logits = module(part.images)
        return task.loss_sum(logits, part, label_smoothing=config.optim.label_smoothing)

    lines = [
        f"step {context['step']}, {len(part)} pictures of {config.model.factory}",
    ]
    if emulation_notice(context["precision"], device) is not None:
        lines.append("precision=bf16 as in the run: this CPU emulates it, slowly")
    found = first_non_finite(module, loss_of_piece, len(part))
    if found is None:
        lines.append("every layer, the loss and all gradients are finite here")
    else:
        place, rows = found
        lines.append(place)
        samples = [context["samples"][row] for row in rows]
        if samples:
            lines.append(f"training samples: {', '.join(map(str, samples))}")
    if options.anomaly:
        lines.append(_anomaly(loss_of_piece))
    return "\n".join(lines), found is not None


def _anomaly(loss_of_piece: Callable[[], Tensor]) -> str:
    """Return what autograd's anomaly mode says: the operation, and the line that made it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                loss_of_piece().backward()
        except RuntimeError as error:
            where = [str(w.message) for w in told if "forward call" in str(w.message)]
            return "\n".join(["anomaly mode:", *where, str(error)])
    return "anomaly mode: nothing in the backward is NaN"


def _config_of(text: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return compose([], config_file=path).config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
