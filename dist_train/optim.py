"""Optimizers, the learning rate as a function of the step, and the average of the weights."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.config import Config, OptimConfig
from dist_train.muon import Muon
from dist_train.plan import ONE_CYCLE_WARMUP, Plan

ONE_CYCLE_START = 1 / 25  # of the peak; Smith & Topin 2018, arXiv:1708.07120


def peak_learning_rate(config: OptimConfig, global_batch_size: int) -> float:
    """Return optim.lr scaled with the global batch (linear: Goyal et al. 2017, 1706.02677)."""
    ratio = global_batch_size / config.lr_base_batch_size
    return config.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def learning_rate(step: int, config: OptimConfig, plan: Plan) -> float:
    """Return the learning rate of `step`, counted from 0: a pure function, nothing is remembered.

    linear and cosine (Loshchilov & Hutter 2017, arXiv:1608.03983) warm up linearly to the peak and
    fall to `final_lr_fraction` of it; one_cycle rises and falls along half cosines.
    """
    peak = peak_learning_rate(config, plan.global_batch_size)
    final = peak * config.final_lr_fraction
    warmup, total = plan.warmup_steps, plan.total_steps
    if config.schedule == "one_cycle":
        if config.warmup_steps is None:
            warmup = warmup or round(ONE_CYCLE_WARMUP * total)
        if step < warmup:
            return _half_cosine(peak * ONE_CYCLE_START, peak, step / warmup)
        return _half_cosine(peak, final, _progress(step, warmup, total))
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    progress = _progress(step, warmup, total)
    if config.schedule == "linear":
        return peak + (final - peak) * progress
    return _half_cosine(peak, final, progress)


def learning_rate_in_force(step: int, generation: int, config: Config, plan: Plan) -> float:
    """Return the learning rate of `step`, lowered once for each time that the run went back."""
    factor = config.guards.rollback_lr_factor**generation
    return factor * learning_rate(step, config.optim, plan)


def _progress(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step - warmup) / max(1, total - warmup))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the fused optimizer, its state already zeros: a step allocates nothing.

    A fused SGD whose very first step is skipped would take uninitialised memory as momentum.
    """
    _leave_dynamo_out()
    params = [p for p in model.parameters() if p.requires_grad]
    if config.name == "muon":
        return _muon(model, config)
    decayed = [p for p in params if config.decay_norms_and_biases or p.ndim > 1]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in params if id(p) not in kept], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        for param in params:
            adamw.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
        return adamw
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
    )
    if config.momentum > 0:
        for param in params:
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def _leave_dynamo_out() -> None:
    """Keep torch's optimizers from importing torch._dynamo, a second of every start.

    They ask it not to trace some of their methods, which it does only under torch.compile; that
    is answered here once for all: torch/_compile.py looks for this mark before it imports.
    """
    for name in ("add_param_group", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        if not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)  # no attribute to a checker


def _muon(model: nn.Module, config: OptimConfig) -> Muon:
    """Give Muon the filters and matrices but the last registered, the head; the rest SGD."""
    params = [p for p in model.parameters() if p.requires_grad]
    filters = [p for p in params if p.ndim > 1][:-1]
    chosen = {id(p) for p in filters}
    rest = [p for p in params if id(p) not in chosen]
    kept = [p for p in rest if p.ndim < 2 and not config.decay_norms_and_biases]
    spared = {id(p) for p in kept}
    momentum = config.momentum if config.rest_momentum is None else config.rest_momentum
    of_rest = {
        "orthogonal": False,
        "momentum": momentum,
        "nesterov": config.nesterov,
        "lr_share": (config.rest_lr or config.lr) / config.lr,
    }
    decay = config.weight_decay
    groups = [
        {
            "params": filters,
            "orthogonal": True,
            "steps": config.orthogonal_steps,
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "unit": config.unit_filters,
            "weight_decay": 0.0 if config.unit_filters else decay,
        },
        {"params": [p for p in rest if id(p) not in spared], "weight_decay": decay, **of_rest},
        {"params": kept, "weight_decay": 0.0, **of_rest},
    ]
    return Muon([group for group in groups if group["params"]], lr=config.lr)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what a checkpoint holds of an optimizer; its settings stay the configuration's.

    The learning rate is none of them: it is the last step's, until the next one has its own.
    """
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
        for param in group["params"]:
            _lay_out_like(param, optimizer.state[param])
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] > 0:
            for param in group["params"]:
                held = optimizer.state[param]
                if held.get("momentum_buffer") is None:  # it was trained without until now
                    held["momentum_buffer"] = torch.zeros_like(param)


def _lay_out_like(param: Tensor, held: dict[str, Any]) -> None:
    """Bring what an optimizer holds of a parameter into its strides: fused kernels ask for no less.

    They take both as rows of numbers, and would give each weight another one's momentum.
    """
    for name, value in held.items():
        whole = isinstance(value, Tensor) and value.shape == param.shape
        if whole and value.stride() != param.stride():
            held[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def lean_step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return `optimizer.step` without what torch wraps around it: 40 of 100 microseconds.

    The wrappers serve the profiler's ranges, hooks and differentiable optimizers. SGD with momentum
    also needs no new lists a step: another 40.
    """
    step = inspect.unwrap(type(optimizer).step)
    if isinstance(optimizer, torch.optim.SGD) and all(
        group["momentum"] > 0 for group in optimizer.param_groups
    ):
        return _LeanSgd(optimizer, step)

    def take() -> None:
        with torch.no_grad():
            step(optimizer)

    return take


class _LeanSgd:
    """The step of torch.optim.SGD(fused=True, momentum=...): the same kernel, its lists kept."""

    def __init__(
        self, optimizer: torch.optim.SGD, step: Callable[[torch.optim.Optimizer], object]
    ) -> None:
        self._optimizer = optimizer
        self._step = step
        self._lists: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]] = []

    @torch.no_grad()
    def __call__(self) -> None:
        optimizer = self._optimizer
        if not self._lists or not self._up_to_date():
            self._lists = self._gathered()
        gradients = [[p.grad for p in params] for _, params, _ in self._lists]
        if any(grad is None for grads in gradients for grad in grads):  # a model left some out
            self._step(optimizer)
            return
        found_inf = getattr(optimizer, "found_inf", None)
        for (group, params, held), grads in zip(self._lists, gradients, strict=True):
            torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage] # torch.optim.SGD's own
                params,
                grads,  # type: ignore[arg-type] # none is None
                held,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                is_first_step=False,
                grad_scale=None,
                found_inf=found_inf,
            )

    def _up_to_date(self) -> bool:
        """Say whether the momentum is still that of the lists: a restored state is made anew."""
        _, params, held = self._lists[0]
        group = self._lists[0][0]
        state = self._optimizer.state[params[0]]
        return state["momentum_buffer"] is held[0] and group is self._optimizer.param_groups[0]

    def _gathered(self) -> list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]:
        """Return (group, parameters, their momentum), one for each dtype and group."""
        found = []
        for group in self._optimizer.param_groups:
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for param in group["params"]:
                by_dtype.setdefault(param.dtype, []).append(param)
            for params in by_dtype.values():
                held = [self._optimizer.state[p]["momentum_buffer"] for p in params]
                found.append((group, params, held))
        return found


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write `lr`, times a group's own share, into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)


class Ema:
    """Exponential moving average of the weights (Polyak & Juditsky 1992), warmed up at the start.

    The decay of a step is min(decay, (1 + step) / (10 + step)). Buffers are not averaged: an
    evaluation with these weights uses the model's own BatchNorm statistics.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        named = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self.names, self.params = list(named), list(named.values())
        self.average = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int, keep: Tensor | None = None) -> None:
        """Move the average towards the weights.

        Args:
            step: the step just taken.
            keep: 0-d, 1.0 leaves the average as it is (the step was skipped on the device).
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        if keep is None:  # one kernel for all of them
            torch._foreach_lerp_(self.average, self.params, weight)  # pyright: ignore # as torch's optimizers do
            return
        weight_0d = weight * (1 - keep)
        for average, param in zip(self.average, self.params, strict=True):
            average.lerp_(param, weight_0d)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the average; a second call undoes the first."""
        for param, average in zip(self.params, self.average, strict=True):
            held = param.detach().clone()
            param.copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """Return {parameter name: average}."""
        return dict(zip(self.names, self.average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the averages over from `state`."""
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state[name])
