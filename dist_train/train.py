"""The loop. `train(config)` runs a whole training, or the rest of one, and returns its summary."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from dist_train.build import autocast, build_model, checked_logits, precision_in_force
from dist_train.claim import open_run
from dist_train.config import Config
from dist_train.data.batch import Batch
from dist_train.data.loaders import Data, open_data
from dist_train.distributed import Ranks, shorten_timeouts, start_ranks
from dist_train.metrics import Meter
from dist_train.optim import Ema, build_optimizer, learning_rate, set_learning_rate
from dist_train.order import GlobalOrderSampler, micro_batches, seed_of
from dist_train.parallel import Replica
from dist_train.plan import Plan, make_plan
from dist_train.preemption import StopRequest, listen_for_stop
from dist_train.profiling import profiled
from dist_train.recovery import NonFiniteGuard, diverged
from dist_train.run import Run
from dist_train.state import Parts, Progress
from dist_train.tasks import classification as task


def train(config: Config) -> dict[str, Any]:
    """Train, evaluate and save as `config` says; the same call continues an interrupted run.

    Collective: torchrun or SLURM start one process a GPU; without them it is one process.

    Returns:
        The summary, as in summary.json; `state` is "finished" or "preempted".

    Raises:
        ConfigError: the user's mistake, on all ranks.
        NonFiniteError: training diverged, on all ranks.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(listen_for_stop(config.train.max_minutes))
        ranks = stack.enter_context(start_ranks(config))
        run = stack.enter_context(open_run(config, ranks))
        if run.finished is not None:
            return run.finished

        data = open_data(config, ranks)
        plan = make_plan(config, data.num_train)
        parts = _build_parts(config, plan, data, ranks, run)
        stack.callback(parts.replica.close)
        meter = Meter(ranks, plan)
        progress = run.resume(parts, meter, data.fingerprint())
        sampler = GlobalOrderSampler(
            data.num_train,
            global_batch_size=plan.global_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
            generation=progress.generation,
            drop_last=config.train.drop_last,
        )
        throw_away_step(parts, data, sampler)
        shorten_timeouts(ranks, config.parallel.step_timeout_sec)
        run.open_writer(stack)
        trackers = run.open_trackers(stack, progress, plan)

        stopping = _evaluate_if_due(parts, data, progress, run, stop)
        last_step = progress.step if stopping or progress.patience_is_over else plan.total_steps
        meter.start(progress.step)
        batches = data.loader.train_batches(sampler, progress.step, last_step)
        for batch in profiled(batches, config.profile, run.path, ranks, progress.step):
            sums = train_step(parts, batch, step=progress.step, generation=progress.generation)
            progress.step += 1
            progress.samples_seen += batch.global_size
            meter.add(sums)
            _note_skips(parts, batch, progress, run)
            if not meter.meeting_due(progress.step):
                continue

            # A boundary: all ranks are here, and agree on what comes next.
            stopping = meter.meet(progress, stopping=stop.reason is not None)
            _note_skips(parts, batch, progress, run, settle=True)
            if plan.log_due(progress.step):
                trackers.log(run.stamp(progress, plan) | meter.line(progress))
            meter.pause()
            best_before = progress.best_step
            stopping = stopping or _evaluate_if_due(parts, data, progress, run, stop)
            is_best = progress.best_step != best_before and config.checkpoint.keep_best
            if plan.save_due(progress.step) or is_best or stopping or progress.patience_is_over:
                run.save(parts, progress, meter)
            meter.resume()
            if stopping or progress.patience_is_over:
                break

        result = None if stopping else _final_evaluation(parts, data, progress, run, stop)
        if result is None:
            return run.end_preempted(progress, ranks.gather(stop.reason))
        return run.end_finished(parts, progress, data, result)


def train_step(parts: Parts, batch: Batch, *, step: int, generation: int = 0) -> Tensor:
    """Take one optimizer step on this rank's part of a global batch. Collective.

    Returns:
        (3,) float64 on the device: this rank's summed loss, correct and samples.
    """
    config, replica, optimizer = parts.config, parts.replica, parts.optimizer
    scaler, guard = parts.scaler, parts.guard
    set_learning_rate(optimizer, learning_rate(step, config.optim, parts.plan))
    replica.zero_grad()
    guard.before_step()
    sums = torch.zeros(3, dtype=torch.float64, device=batch.images.device)

    pieces = micro_batches(len(batch), config.train.micro_batch_size)
    for first, last in pieces:
        part = batch.part(first, last)
        # Dropout: a function of the run's place, never of the rank.
        torch.manual_seed(seed_of(config.seed, generation, step, part.first_position))
        with replica.synchronising(last=last == len(batch)):
            with autocast(parts.precision, part.images.device):
                logits = replica(part.images)
            loss = task.loss_sum(logits, part, label_smoothing=config.optim.label_smoothing)
            scaled = loss * (replica.loss_factor / batch.global_size)
            (scaled if scaler is None else scaler.scale(scaled)).backward()
        sums += task.train_sums(loss, logits, part)

    replica.reduce()
    if scaler is not None:
        scaler.unscale_(optimizer)
    grad_norm = replica.clip(config.optim.clip_norm)
    if guard.approves(grad_norm, step):
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
        if parts.ema is not None:
            parts.ema.update(step, keep=guard.skip_flag)
    guard.after_step()
    return sums


def evaluate(
    parts: Parts, data: Data, split: str, should_stop: Callable[[], bool] | None = None
) -> dict[str, float] | None:
    """Evaluate every sample of `split` exactly once. Collective, waits.

    Whole batches are dealt to the ranks and their sums added in order: the same numbers at any
    world size. Rank 0's buffers count.

    Returns:
        loss, accuracy, top5 (fractions) and samples; None if a rank asked to stop in between.
    """
    replica, ranks = parts.replica, parts.replica.ranks
    replica.agree_on_buffers()
    replica.module.eval()
    count = data.loader.num_eval_batches(split)
    sums = torch.zeros(count, 4, dtype=torch.float64, device=ranks.device)
    batches = data.loader.eval_batches(split, ranks.rank, ranks.world_size)
    try:
        with torch.no_grad():
            for _ in range(-(-count // ranks.world_size)):
                dealt = next(batches, None)
                if dealt is not None:
                    number, batch = dealt
                    with autocast(parts.precision, ranks.device):
                        logits = replica.module(batch.images)
                    sums[number] = task.eval_sums(logits, batch)
                if should_stop is not None and ranks.any(should_stop()):
                    return None
    finally:
        replica.module.train()
    rows = ranks.all_reduce(sums).tolist()  # each row is one rank's, the rest add zeros
    loss, top1, top5, samples = (sum(column) for column in zip(*rows, strict=True))
    return {
        "loss": loss / samples,
        "accuracy": top1 / samples,
        "top5": top5 / samples,
        "samples": int(samples),
    }


def evaluate_weights(
    parts: Parts, data: Data, split: str, stop: StopRequest
) -> dict[str, float] | None:
    """Evaluate the weights; with an average of them both, and the average's numbers count."""

    def asked() -> bool:
        return stop.reason is not None

    result = evaluate(parts, data, split, asked)
    if parts.ema is None or result is None:
        return result
    parts.ema.swap()
    try:
        averaged = evaluate(parts, data, split, asked)
    finally:
        parts.ema.swap()
    return None if averaged is None else averaged | {"raw_accuracy": result["accuracy"]}


def throw_away_step(parts: Parts, data: Data, sampler: GlobalOrderSampler) -> None:
    """Run forward and backward once at the real shapes and leave no trace. Collective.

    DDP rebuilds its buckets after its first iteration and then sums in another order: without
    this a resumed run would differ in bits. It also warms the communicator and finds a model that
    does not fit the data before anything is trained.
    """
    replica, config, device = parts.replica, parts.config, parts.replica.ranks.device
    size = micro_batches(len(sampler.take(0).indices), config.train.micro_batch_size)[0][1]
    images = torch.zeros((size, *data.loader.image_shape), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    parts.guard.before_step()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        replica.zero_grad()
        logits = replica.ranks.together(
            lambda: checked_logits(replica, images, data.num_classes, config.model.factory)
        )
        task.loss_sum(logits, Batch(images=images, labels=labels)).backward()
        replica.reduce()
    replica.zero_grad()
    parts.guard.restore_buffers()


def _build_parts(config: Config, plan: Plan, data: Data, ranks: Ranks, run: Run) -> Parts:
    precision, notice = precision_in_force(config, ranks.device)
    run.warn(data.notice, plan.notice, notice)
    model = ranks.together(lambda: build_model(config, data.num_classes, ranks))
    replica = Replica(model, ranks, config.parallel)
    optimizer = build_optimizer(replica.module, config.optim)
    scaler = torch.amp.GradScaler(ranks.device.type) if precision == "fp16" else None
    ema = None if config.optim.ema_decay is None else Ema(replica.module, config.optim.ema_decay)
    return Parts(
        config=config,
        plan=plan,
        replica=replica,
        optimizer=optimizer,
        scaler=scaler,
        ema=ema,
        guard=NonFiniteGuard(replica.module, optimizer, scaler, config.guards, ranks.device),
        precision=precision,
    )


def _evaluate_if_due(
    parts: Parts, data: Data, progress: Progress, run: Run, stop: StopRequest
) -> bool:
    """Evaluate if it is due and not yet done; returns whether a rank asked to stop meanwhile."""
    if not parts.plan.eval_due(progress.step) or progress.evaluated_step == progress.step:
        return False
    result = evaluate_weights(parts, data, data.eval_split, stop)
    if result is None:
        return True
    progress.note_evaluation(result, validated=data.num_val > 0)
    run.log_evaluation(progress, parts.plan, data.eval_split, result)
    return False


def _final_evaluation(
    parts: Parts, data: Data, progress: Progress, run: Run, stop: StopRequest
) -> dict[str, float] | None:
    """Evaluate the test split with the weights that the run stands for; None if asked to stop."""
    if progress.patience is not None and progress.best_step is not None:
        run.load_best(parts, progress)
    elif data.eval_split == "test" and progress.evaluated_step == progress.step:
        return progress.last_eval
    return evaluate_weights(parts, data, "test", stop)


def _note_skips(
    parts: Parts, batch: Batch, progress: Progress, run: Run, *, settle: bool = False
) -> None:
    """Count skipped steps; after too many in a row say where it began, and give up. Collective."""
    skipped = parts.guard.take_skipped(settle=settle)
    for step in skipped:
        progress.skipped_steps += 1
        run.folder.event("skipped_step", step=step, reason="gradient norm is not finite")
    if not skipped or not parts.guard.exhausted:
        return

    def loss_of_batch() -> Tensor:
        with autocast(parts.precision, batch.images.device):
            logits = parts.replica.module(batch.images)
        return task.loss_sum(logits, batch)

    replica, in_a_row = parts.replica, parts.guard.consecutive
    raise diverged(replica.ranks, replica.module, loss_of_batch, skipped[-1], in_a_row)
