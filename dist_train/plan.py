"""How long, how often, how large: what follows from the configuration and the data's size."""

from dataclasses import dataclass

from dist_train.config import Config, ConfigError
from dist_train.config.check import check_pieces
from dist_train.order import steps_per_epoch

ONE_CYCLE_WARMUP = 0.3  # of the run, if no warm-up is set


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The numbers of a run; every period is in steps."""

    num_train: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    log_every: int
    eval_every: int | None
    save_every: int | None  # None: when the writer says so, by the clock
    notice: str | None = None  # a sentence that the user must see

    def eval_due(self, step: int) -> bool:
        """Say whether an evaluation belongs after `step` steps (the last one included)."""
        periodic = self.eval_every is not None and step % self.eval_every == 0
        return step > 0 and (periodic or step == self.total_steps)

    def save_due(self, step: int) -> bool:
        """Say whether a checkpoint belongs after `step` steps (the last one included)."""
        periodic = self.save_every is not None and step % self.save_every == 0
        return step > 0 and (periodic or step == self.total_steps)

    def log_due(self, step: int) -> bool:
        """Say whether a line of metrics belongs after `step` steps."""
        return step > 0 and (step % self.log_every == 0 or step == self.total_steps)

    def next_event(self, step: int) -> int:
        """Return the next step after `step` at which something is logged, evaluated or saved."""
        periods = [e for e in (self.log_every, self.save_every, self.eval_every) if e is not None]
        return min(self.total_steps, *((step // every + 1) * every for every in periods))

    def epoch(self, step: int) -> float:
        """Return how many epochs `step` steps are."""
        return step / self.steps_per_epoch


def make_plan(config: Config, num_train: int, *, world_size: int) -> Plan:
    """Derive the plan.

    Raises:
        ConfigError: the data set is smaller than one global batch, or the last step of an epoch
            cannot be cut over `world_size` ranks.
    """
    train, batch = config.train, config.train.global_batch_size
    per_epoch = steps_per_epoch(num_train, batch, drop_last=train.drop_last)
    if per_epoch == 0:
        raise ConfigError(
            f"train.global_batch_size={batch} is larger than the training split ({num_train} "
            f"samples{_without(config.data.val_fraction)}): lower it, or set train.drop_last=false"
        )
    rest = num_train % batch
    if train.order == "fixed" and not train.drop_last and 0 < rest < train.num_shards:
        raise ConfigError(
            f"the last step of an epoch has {rest} samples, fewer than train.num_shards (= "
            f"{train.num_shards}): set train.drop_last=true, or another train.global_batch_size"
        )
    if not train.drop_last and 0 < rest < world_size:
        raise ConfigError(
            f"the last step of an epoch has {rest} samples ({num_train} of training, "
            f"train.global_batch_size={batch}), fewer than world_size (= {world_size}): set "
            "train.drop_last=true, or another train.global_batch_size, or start at most "
            f"{rest} ranks"
        )
    if not train.drop_last:
        check_pieces(config, rest, world_size, cure="train.drop_last=true")
    total = train.steps if train.steps is not None else (train.epochs or 0) * per_epoch
    warmup = config.optim.warmup_steps
    if warmup is None:
        warmup = round(config.optim.warmup_epochs * per_epoch)
        if config.optim.schedule == "one_cycle":
            warmup = warmup or round(ONE_CYCLE_WARMUP * total)
    notice = None
    if warmup >= total:
        notice = (
            f"the warm-up ({warmup} steps) is as long as the run ({total}): the learning rate "
            "never reaches its peak; lower optim.warmup_epochs or optim.warmup_steps"
        )
    every = config.eval.every_steps
    if every is None and config.eval.every_epochs is not None:
        every = config.eval.every_epochs * per_epoch
    save_every = config.checkpoint.every_steps
    return Plan(
        num_train=num_train,
        global_batch_size=batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        log_every=config.log_every,
        eval_every=every,
        save_every=None if save_every == "auto" else save_every or per_epoch,
        notice=notice,
    )


def _without(val_fraction: float) -> str:
    return f", without the {val_fraction:g} of data.val_fraction" if val_fraction else ""
