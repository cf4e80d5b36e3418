"""Make the parts of a run from the configuration: model, precision, optimizer, average."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dist_train.config import Config, ConfigError
from dist_train.config.importing import import_callable
from dist_train.config.user_code import (
    NEXT_LINE,
    is_of_machine,
    own_frame,
    place,
    said,
    user_code,
)
from dist_train.device import arm_multiplies_bf16, multiplies_bf16
from dist_train.distributed import Ranks
from dist_train.fitting import what_fits
from dist_train.heartbeat import Phase, Pulse
from dist_train.memory import is_out_of_memory
from dist_train.models.activation import checkpoint_activations
from dist_train.order import seed_of
from dist_train.own_memory import check_apart
from dist_train.tasks.outputs import SUPPORTED, Output, UnknownOutputError, heads_of

BACKEND = "inductor"  # of torch.compile
MOST_GRAPHS = 64  # beyond torch's 8 the rest would run uncompiled


def build_model(config: Config, num_classes: int, ranks: Ranks) -> nn.Module:
    """Call model.factory with num_classes and model.args; weights are a function of the seed.

    Raises:
        ConfigError: the factory cannot be imported, called, or returns no module that can be
            trained on the device.
    """
    factory = import_callable(config.model.factory, "model.factory")
    _check_call(factory, config, num_classes)
    torch.manual_seed(seed_of(config.seed, 6))
    shown = ", ".join(
        f"{k}={v!r}" for k, v in {"num_classes": num_classes, **config.model.args}.items()
    )
    call = f"model.factory={config.model.factory} called with ({shown})"
    with user_code(f"{call} fails"), _told_by_first_rank(ranks):
        model = factory(num_classes=num_classes, **config.model.args)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory={config.model.factory} returned {type(model).__name__}: it must "
            "return a torch.nn.Module"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"model.factory={config.model.factory} returned a module without trainable parameters"
        )
    lazy = next(
        (
            name
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if is_lazy(tensor)
        ),
        None,
    )
    if lazy is not None:
        raise ConfigError(
            f"model.factory={config.model.factory} returned a module whose {lazy} has no shape "
            "yet: give lazy layers their sizes, or let the factory forward a batch of zeros once"
        )
    if config.model.activation_checkpointing:
        checkpoint_activations(model)
    if ranks.device.type == "cuda":
        check_apart(model)
    return model.to(ranks.device)


def model_in_words(model: nn.Module, config: Config) -> str:
    """Return what is trained: the factory, its arguments, and how many parameters there are."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in config.model.args.items())
    num = sum(p.numel() for p in model.parameters())
    return f"{config.model.factory}({arguments}), {num:,} parameters"


def _check_call(factory: Callable[..., Any], config: Config, num_classes: int) -> None:
    """Raise ConfigError if the factory's signature does not take what it is given."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some built in C have none
        return
    try:
        signature.bind(num_classes=num_classes, **config.model.args)
    except TypeError as error:
        raise ConfigError(
            f"model.factory={config.model.factory} cannot be called: {error}. It is given "
            "num_classes and model.args by name"
        ) from None


def compile_in_place(model: nn.Module, pulse: Pulse) -> None:
    """Let torch.compile make graphs of the forward and the backward, when they first run.

    One for each shape of a batch: a graph for any shape would be made when the second one comes,
    so that the bits of a step would depend on what was computed before it. Meanwhile `pulse` says
    that this rank starts, which may take long.
    """
    from torch._dynamo import config
    from torch._dynamo.callback import on_compile_end, on_compile_start

    before: list[Phase] = []

    def begin(*_: object) -> None:
        before.append(pulse.phase)
        pulse.enter("start")

    def end(*_: object) -> None:
        pulse.enter(before.pop())

    on_compile_start(begin)
    on_compile_end(end)
    config.recompile_limit = MOST_GRAPHS
    model.compile(backend=BACKEND, dynamic=False)


def as_written(config: Config) -> AbstractContextManager[object]:
    """Return the context in which a compiled model runs uncompiled: for hooks and counters."""
    if not config.model.compile:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def precision_in_force(config: Config, device: torch.device) -> tuple[str, str | None]:
    """Return the precision to compute in, and a notice if it is not a good one, or not the asked.

    What gains from bf16: CPUs with AMX (3 times fp32) or AVX-512's bf16 instructions (1.4 to 2.3
    times, on an AMD EPYC), and GPUs of capability 8.0 or newer. A CPU with AVX-512 alone emulates
    it at a third of fp32's speed; others are tens of times slower. On ARM auto is fp32: what
    training gains from its instructions is not measured, and oneDNN has no gradients of
    convolutions in them.
    """
    if config.precision == "auto":
        return ("bf16" if _gains_from_bf16(device) else "fp32"), None
    if config.precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16():
        return "fp32", (
            "precision=bf16: this CPU has no bf16 instructions and would emulate them many times "
            "slower than fp32: computing in fp32"
        )
    return config.precision, emulation_notice(config.precision, device)


def emulation_notice(precision: str, device: torch.device) -> str | None:
    """Return what to say where `precision` is emulated; None: it is not."""
    if precision != "bf16" or device.type != "cpu" or multiplies_bf16() or arm_multiplies_bf16():
        return None
    return (
        "precision=bf16: this CPU has no bf16 instructions and emulates them at about a third of "
        "the speed of fp32: set precision=auto, which is fp32 here"
    )


def agreed_precision(config: Config, ranks: Ranks) -> tuple[str, str | None]:
    """Return the precision of all ranks, and a notice if it is not what was asked. Collective."""
    everyone = ranks.gather(precision_in_force(config, ranks.device))
    found = [precision for precision, _ in everyone]
    if len(set(found)) == 1:
        told = [(rank, notice) for rank, (_, notice) in enumerate(everyone) if notice]
        if not told or len(told) == len(everyone):
            return found[0], everyone[0][1]
        rank, notice = told[0]
        return found[0], f"rank {rank}: {notice}"
    lacking = found.index("fp32")
    return "fp32", (
        f"precision={config.precision}: rank {lacking}'s {ranks.device.type.upper()} has no units "
        "for bf16, others' have: all compute in fp32"
    )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype)


def checked_logits(
    model: Callable[[Tensor], Output], images: Tensor, num_classes: int, factory: str
) -> Output:
    """Forward `images` and check that the output, of all heads, fits the data.

    Raises:
        ConfigError: the model refuses the pictures or gives other outputs than classes.
    """
    shape = tuple(images.shape)
    try:
        output = model(images)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        short = isinstance(error, Exception) and is_out_of_memory(error)
        if short or isinstance(error, ConfigError) or is_of_machine(error):
            raise
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            told = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model.compile=true: torch cannot compile {factory}: {told}. Set "
                "model.compile=false, or mend what it names"
            ) from error
        module = getattr(model, "module", model)  # of a replica
        fits = None
        if isinstance(module, nn.Module) and len(images) > 1:  # one alone may be what it refuses
            fits = what_fits(module, shape)
        raise ConfigError(_refusal_of_images(error, shape, factory, fits)) from error
    try:
        heads = heads_of(output)
    except UnknownOutputError as error:
        raise ConfigError(
            f"model.factory={factory} returned {error} for images {shape}: it must return "
            f"{SUPPORTED}"
        ) from None
    for _, logits in heads:
        if logits.ndim != 2:
            raise ConfigError(
                f"model.factory={factory} returned {tuple(logits.shape)} for pictures {shape}: it "
                f"must return logits of shape ({shape[0]}, {num_classes})"
            )
        if logits.shape[1] != num_classes:
            raise ConfigError(
                f"model.factory={factory} gives {logits.shape[1]} outputs, the data have "
                f"{num_classes} classes: let the factory use its argument num_classes, or drop a "
                "number of classes from model.args"
            )
    return output


@contextlib.contextmanager
def _told_by_first_rank(ranks: Ranks) -> Iterator[None]:
    """Let rank 0 alone print what a library says of its versions to come, the same on all."""
    if ranks.rank == 0:
        yield
        return
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


def _refusal_of_images(
    error: BaseException, shape: tuple[int, ...], factory: str, fits: str | None
) -> str:
    frame = own_frame(error)
    lines = [
        f"model.factory={factory} fails on pictures of shape {shape} (batch, channels, height, "
        f"width): {said(error).removeprefix('RuntimeError: ')}",
        *([] if frame is None else [place(frame)]),
        "Make the model fit the data (model.args), or the data the model",
    ]
    if fits is not None:
        lines[-1] += f": {fits}"
    if frame is None:  # one line is enough
        return f"{lines[0]}. {lines[1]}"
    return NEXT_LINE.join(lines)


def _gains_from_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return multiplies_bf16()


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
