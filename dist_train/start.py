"""From the configuration to the first step: parts, the micro-batch that fits, a trial, batches."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dist_train.build import (
    agreed_precision,
    as_written,
    autocast,
    build_model,
    checked_logits,
    compile_in_place,
    model_in_words,
)
from dist_train.config import Config
from dist_train.config.augmentation import hint
from dist_train.config.user_code import user_code
from dist_train.data.batch import Batch
from dist_train.data.feed import Feed
from dist_train.data.loaders import Data
from dist_train.distributed import Ranks
from dist_train.drift import DAMAGED, DriftCheck
from dist_train.memory import (
    SAFETY,
    bytes_per_sample,
    host_memory_left,
    largest_that_fits,
)
from dist_train.memory_format import corrupting_layer, laid_out, lay_out, memory_format_in_force
from dist_train.nonfinite import NonFiniteGuard
from dist_train.optim import Ema, build_optimizer, lean_step
from dist_train.order import GlobalOrderSampler
from dist_train.parallel import Replica
from dist_train.plan import Plan
from dist_train.recovery import Recovery
from dist_train.run import Run
from dist_train.run_folder import cpu_name
from dist_train.state import Parts
from dist_train.sync_form import choose_form
from dist_train.tasks import classification as task
from dist_train.trial import blank

SHOWN_TO_MODEL = 1000  # pictures, to a model that is initialised from some


def build_parts(config: Config, plan: Plan, data: Data, run: Run) -> Parts:
    """Make everything that a step works with. Collective.

    Raises:
        ConfigError: the model cannot be made; on all ranks.
    """
    ranks = run.ranks
    precision, notice = agreed_precision(config, ranks)
    run.warn(data.notice, plan.notice, notice)
    for remark in data.remarks:
        run.say(remark)
    run.say(f"image size: {data.image_size}")
    run.say(f"images are loaded {data.loading}")
    run.say(f"augmentation: {data.augmentation}{hint(config.data, data.name)}")
    if config.precision == "auto":
        run.say(f"precision={precision}, as this hardware does best (precision=auto)")
    model = ranks.together(lambda: build_model(config, data.num_classes, ranks))
    run.say(f"model: {model_in_words(model, config)}")
    form = memory_format_in_force(config.model.memory_format, model, precision, ranks.device.type)
    lay_out(model, form)
    layer = corrupting_layer(form, model, precision, ranks.device.type)
    if layer is not None:
        run.warn(
            f"model.memory_format=channels_last: torch's gradient of layer {layer!r} (1x1, with a "
            "stride) may overwrite memory in this form: set model.memory_format=contiguous"
        )
    initialise = getattr(model, "initialise_from", None)
    if callable(initialise):
        ranks.together(lambda: _show_images(initialise, data, form))
    if config.model.compile:
        compile_in_place(model, ranks.pulse)
    mixed = _mixed_hardware(ranks.gather(_hardware(ranks.device)))
    if mixed is not None:
        run.warn(f"{mixed}: last bits of their sums may differ, and with them in time the replicas")
    choice = choose_form(config, ranks, run.states.facts())
    run.warn(choice.warning)
    if choice.remark:
        run.say(choice.remark)
    replica = Replica(model, ranks, config, choice.form)
    optimizer = build_optimizer(replica.module, config.optim)
    scaler = torch.amp.GradScaler(ranks.device.type) if precision == "fp16" else None
    if scaler is not None:
        scaler.scale(torch.zeros((), device=ranks.device))  # makes its tensors now
    ema = None if config.optim.ema_decay is None else Ema(replica.module, config.optim.ema_decay)
    guard = NonFiniteGuard(replica.buffers, optimizer, scaler, config.guards, ranks.device)
    return Parts(
        config=config,
        plan=plan,
        replica=replica,
        optimizer=optimizer,
        take_step=optimizer.step if config.profile.steps else lean_step(optimizer),
        scaler=scaler,
        ema=ema,
        guard=guard,
        recovery=Recovery(config, replica, guard, remember=run.chain.remember_micro_batch),
        drift=DriftCheck(
            ranks,
            list(replica.module.named_parameters()),
            optimizer,
            ema,
            every=config.guards.drift_every,
            cause=DAMAGED if mixed is None else f"{mixed}, or memory was damaged",
        ),
        precision=precision,
        memory_format=form,
        num_classes=data.num_classes,
    )


def _show_images(initialise: Callable[[Tensor], object], data: Data, form: str) -> None:
    with user_code("the model's initialise_from fails"):
        initialise(laid_out(data.loader.some_pictures(SHOWN_TO_MODEL), form))


def _hardware(device: torch.device) -> str:
    """Return what the bits of a rank's results depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, threads={torch.get_num_threads()}"


def _mixed_hardware(names: list[str]) -> str | None:
    """Say which ranks compute on something else than rank 0; None: none does."""
    odd = [rank for rank, name in enumerate(names) if name != names[0]]
    if not odd:
        return None
    return f"rank {odd[0]} computes on {names[odd[0]]}, rank 0 on {names[0]}"


def find_micro_batch_size(parts: Parts, data: Data, run: Run) -> None:
    """Find the largest micro-batch that fits on every rank, if train.micro_batch_size=auto.

    Each rank tries for itself, without any collective, and the smallest answer counts. On a GPU
    forward and backward are tried; a CPU never refuses memory, so there the need is estimated and
    compared with what the machine has left. Collective; a resumed run keeps what it had.
    """
    config, ranks, module = parts.config, parts.replica.ranks, parts.replica.module
    known, remembered = parts.recovery.micro_batch_size, run.chain.micro_batch_size
    if remembered is not None:
        parts.recovery.shortage = "an attempt before this one ran out of memory"
        parts.recovery.micro_batch_size = min(remembered, known or remembered)
    if config.train.micro_batch_size != "auto" or parts.recovery.micro_batch_size is not None:
        return
    cuda = [ranks.device] if ranks.device.type == "cuda" else []
    whole = -(-parts.plan.global_batch_size // ranks.world_size)

    def attempt(size: int) -> None:
        # Of a part of the share: the gradients of the parts before it lie there.
        before = [torch.empty_like(p) for p in parts.replica.params] if size < whole else []
        with torch.random.fork_rng(devices=cuda), as_written(config):  # no graph for every size
            images, labels = blank(parts, data, size)
            with autocast(parts.precision, ranks.device):
                logits = module(images)
            loss = task.loss_sum(logits, Batch(images=images, labels=labels))
            torch.autograd.grad(loss, parts.replica.params, allow_unused=True)
        del before

    def find() -> int:
        with torch.random.fork_rng(devices=cuda), as_written(config), torch.no_grad():
            two, _ = blank(parts, data, 2)
            with autocast(parts.precision, ranks.device):
                checked_logits(module, two, data.num_classes, config.model.factory)
        if ranks.device.type == "cuda":
            return largest_that_fits(whole, attempt)
        with as_written(config):
            each = bytes_per_sample(module, data.loader.image_shape)
        budget = SAFETY * host_memory_left() / ranks.local_world_size
        return max(1, min(whole, int(budget / max(1.0, each))))

    parts.replica.buffers.remember()
    if cuda:
        _let_nccl_allocate(parts.replica.params, ranks)
    sizes = ranks.gather(ranks.together(find))
    if cuda:
        torch.cuda.empty_cache()  # whatever takes memory beside torch finds what is left
    parts.replica.buffers.restore()  # here, not in an attempt: those that failed spoil them too
    parts.recovery.micro_batch_size = min(sizes)
    if min(sizes) < whole:
        parts.recovery.shortage = f"there is memory for {min(sizes)} of a share of {whole}"
    run.note(
        {
            "event": "micro_batch_size",
            "step": 0,
            "say": f"train.micro_batch_size=auto: {min(sizes)} of a share of {whole}",
            "sizes": sizes,
        }
    )


def _let_nccl_allocate(params: list[nn.Parameter], ranks: Ranks) -> None:
    """Sum as many zeros as there are gradients. Collective.

    NCCL takes memory of its own at the first sum of a kind, and that is no part of torch's.
    """
    for dtype in dict.fromkeys(param.dtype for param in params):
        size = sum(param.numel() for param in params if param.dtype == dtype)
        ranks.all_reduce(torch.zeros(size, dtype=dtype, device=ranks.device))


def open_feed(parts: Parts, data: Data, *, last_step: int, generation: int = 0) -> Feed:
    """Return this rank's batches of every step before `last_step`."""
    config, ranks = parts.config, parts.replica.ranks
    sampler = GlobalOrderSampler(
        data.num_train,
        global_batch_size=parts.plan.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
        generation=generation,
        drop_last=config.train.drop_last,
        num_shards=config.train.num_shards if config.train.order == "fixed" else None,
    )
    return Feed(data.loader, sampler, last_step, parts.memory_format)


@contextlib.contextmanager
def start_left_out_of_collections() -> Iterator[None]:
    """Let Python's garbage collector leave alone what lives already: modules, settings, parts.

    Going through it again and again costs 70 to 90 microseconds a step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
