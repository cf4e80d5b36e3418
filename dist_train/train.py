"""The loop. `train(config)` runs a whole training, or the rest of one, and returns its summary."""

from contextlib import ExitStack
from typing import Any

from dist_train.claim import open_run
from dist_train.config import Config
from dist_train.data.feed import Feed
from dist_train.data.loaders import Data, open_data
from dist_train.distributed import shorten_timeouts, start_ranks
from dist_train.endings import end_finished, end_preempted
from dist_train.evaluation import evaluate_weights
from dist_train.metrics import Meter
from dist_train.plan import make_plan
from dist_train.preemption import StopRequest, listen_for_stop
from dist_train.profiling import traced
from dist_train.progress import Progress
from dist_train.recovery import RollBack
from dist_train.rollback import roll_back
from dist_train.run import Run
from dist_train.start import (
    build_parts,
    find_micro_batch_size,
    open_feed,
    start_left_out_of_collections,
)
from dist_train.state import Parts
from dist_train.step import culprits_of, train_step
from dist_train.trial import prove_resumable, throw_away_step
from dist_train.watchdog import watch


def train(config: Config) -> dict[str, Any]:
    """Train, evaluate and save as `config` says; the same call continues an interrupted run.

    Collective: torchrun or SLURM start one process a GPU; without them it is one process.

    Returns:
        The summary, as in summary.json; `state` is "finished" or "preempted".

    Raises:
        ConfigError: the user's mistake, on all ranks.
        StepFailedError: a step failed on some rank; on all ranks, with that rank's cause.
        NonFiniteError: training diverged, again after going back once; on all ranks.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(listen_for_stop(config.train.max_minutes))
        ranks = stack.enter_context(start_ranks(config))
        run = stack.enter_context(open_run(config, ranks))
        if run.finished is not None:
            return run.finished
        config = run.config  # of the version that began it
        pulse = stack.enter_context(watch(config, ranks, run.path, run.warn))

        data = open_data(config, ranks, say=run.say)
        plan = make_plan(config, data.num_train, world_size=ranks.world_size)
        parts = build_parts(config, plan, data, run)
        stack.callback(parts.replica.close)
        meter = Meter(ranks, plan)
        progress = run.resume(parts, meter, data)
        find_micro_batch_size(parts, data, run)
        pulse.at("start", progress.step)
        weights = throw_away_step(parts, data, step=progress.step)
        prove_resumable(parts, run, meter, weights)
        shorten_timeouts(ranks, config.parallel.step_timeout_sec)
        run.open_writer(stack)
        run.stop_before_job_ends(stop, meter)
        run.open_trackers(stack, progress, plan)
        stack.enter_context(start_left_out_of_collections())

        stack.callback(pulse.end)  # the first thing that happens when this block is left
        while True:
            try:
                stopping = _train_on(parts, data, progress, run, stop, meter)
                result = None if stopping else _final_evaluation(parts, data, progress, run, stop)
                break
            except RollBack as request:
                progress = roll_back(request, run, parts, meter, progress)
        if result is None:
            return end_preempted(run, progress, ranks.gather(stop.reason))
        return end_finished(run, parts, progress, data, result)


def _train_on(
    parts: Parts,
    data: Data,
    progress: Progress,
    run: Run,
    stop: StopRequest,
    meter: Meter,
) -> bool:
    """Train from where `progress` is to the end; returns whether a rank asked to stop before."""
    config, plan, ranks = parts.config, parts.plan, parts.replica.ranks
    pulse = ranks.pulse
    best_before = progress.best_step
    if _evaluate_if_due(parts, data, progress, run, stop):
        return True
    if progress.best_step != best_before and config.checkpoint.keep_best:
        # A run that began with another one's checkpoint has none of this step itself.
        _save(parts, progress, run, meter, must=True)
    last_step = progress.step if progress.patience_is_over else plan.total_steps
    feed = open_feed(parts, data, last_step=last_step, generation=progress.generation)
    meter.start(progress.step)
    save_due = False
    for step in traced(range(progress.step, last_step), config.profile, run.path, ranks):
        outcomes = train_step(parts, feed, step=step, generation=progress.generation)
        progress.samples_seen += feed.take(step).global_size
        progress.step = step + 1
        meter.add(outcomes)
        _settle(parts, feed, progress, run)
        if parts.drift.due(progress.step):
            parts.drift.check(progress.step)
        if not meter.meeting_due(progress.step):
            continue

        # A boundary: all ranks are here, and agree on what comes next.
        pulse.at("logging", progress.step)
        stopping = meter.meet(
            progress, stopping=stop.reason is not None, save_wanted=run.wants_save()
        )
        _settle(parts, feed, progress, run, boundary=True)
        if plan.log_due(progress.step):
            line = meter.line(progress, waited_sec=feed.take_waited_sec())
            run.log(progress, plan, line)
        meter.pause()
        best_before = progress.best_step
        stopping = stopping or _evaluate_if_due(parts, data, progress, run, stop)
        is_best = progress.best_step != best_before and config.checkpoint.keep_best
        last = stopping or progress.patience_is_over or progress.step == plan.total_steps
        save_due = save_due or plan.save_due(progress.step) or meter.save_agreed or is_best
        # A skipped step may be the fault of the weights: they are saved after a good one.
        if last or (save_due and parts.guard.consecutive == 0):
            must = is_best or last or config.checkpoint.exact_steps
            _save(parts, progress, run, meter, must=must)
            save_due = False
        meter.resume()
        if stopping or progress.patience_is_over:
            return stopping
    return False


def _save(parts: Parts, progress: Progress, run: Run, meter: Meter, *, must: bool) -> None:
    """Save this step, once all ranks are known to hold the same. Collective."""
    parts.drift.check(progress.step)  # no checkpoint holds a replica that went astray
    parts.replica.ranks.pulse.at("checkpoint", progress.step)
    run.save(parts, progress, meter, must=must)


def _evaluate_if_due(
    parts: Parts, data: Data, progress: Progress, run: Run, stop: StopRequest
) -> bool:
    """Evaluate if it is due and not yet done; returns whether a rank asked to stop meanwhile.

    After a skipped step nothing becomes the best: the best is saved, and such weights are not.
    """
    if not parts.plan.eval_due(progress.step) or progress.evaluated_step == progress.step:
        return False
    result = evaluate_weights(parts, data, data.eval_split, stop)
    if result is None:
        return True
    good = parts.guard.consecutive == 0
    progress.note_evaluation(result, validated=good and data.num_val > 0)
    parts.replica.ranks.pulse.enter("logging")
    run.log_evaluation(progress, parts.plan, data.eval_split, result)
    return False


def _final_evaluation(
    parts: Parts, data: Data, progress: Progress, run: Run, stop: StopRequest
) -> dict[str, float] | None:
    """Evaluate the test split with the weights that the run stands for; None if asked to stop."""
    if progress.patience is not None and progress.best_step is not None:
        run.load_best(parts, progress)
    elif (
        data.eval_split == "test"
        and progress.evaluated_step == progress.step
        and parts.config.eval.views == 1
    ):
        return progress.last_eval
    return evaluate_weights(parts, data, "test", stop, views=parts.config.eval.views)


def _settle(
    parts: Parts, feed: Feed, progress: Progress, run: Run, *, boundary: bool = False
) -> None:
    """Record what became of the steps so far; after too many skipped in a row go back.

    Collective if a step was skipped.
    """
    if boundary:
        parts.recovery.settle()
    for event in parts.recovery.take_events():
        run.note(event)
        if event["event"] != "skipped_step":
            continue
        progress.skipped_steps += 1
        parts.drift.check(progress.step)  # before the data are blamed
        in_a_row, exhausted = parts.guard.consecutive, parts.guard.exhausted
        # With loss scaling a first infinite norm only says that the scale was too high.
        if exhausted or (in_a_row == 1 and parts.scaler is None and not parts.config.guards.lag):
            run.note_culprits(event["step"], culprits_of(parts, feed, event["step"], run.path))
        if exhausted:
            raise RollBack(
                f"the gradient norm was not finite at step {event['step']}, {in_a_row} steps in a "
                "row",
                new_order=True,
            )
