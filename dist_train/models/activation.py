"""Activation checkpointing: keep each block's input only and recompute the rest in backward.

Chen et al. 2016, https://arxiv.org/abs/1604.06174. Gradients and buffers keep their bits.
"""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_train.config import ConfigError


def checkpoint_activations(model: nn.Module) -> int:
    """Make the model's blocks recompute their activations in backward; return how many.

    A block is a child with parameters and layers of its own. A Sequential of blocks, or a
    container that has no forward, is a stage: each of its blocks counts. So do those of a child
    that holds most of the model (a backbone). Nothing changes in eval mode or without gradients,
    nor in the names of state_dict. Call it before the model is wrapped for data parallelism.

    Raises:
        ConfigError: the model has no such block.
    """
    blocks = _blocks_of(model, most_of_model=_num_modules(model) // 2)
    if not blocks:
        raise ConfigError(
            f"model.activation_checkpointing=true finds no block in {type(model).__name__}: its "
            f"children are single layers. Group them in modules, or set it to false."
        )
    for block in blocks:
        # A bound method, not a closure: copy.deepcopy binds it to the copy.
        block.forward = MethodType(_checkpointed_forward, block)
    return len(blocks)


def _blocks_of(module: nn.Module, *, most_of_model: int) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for child in module.children():
        if _is_layer(child) or next(child.parameters(), None) is None:
            continue
        inner = _blocks_of(child, most_of_model=most_of_model)
        is_backbone = len(inner) > 1 and _num_modules(child) > most_of_model
        blocks += inner if is_backbone or _is_stage(child) else [child]
    return blocks


def _num_modules(module: nn.Module) -> int:
    return sum(1 for _ in module.modules())


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_stage(module: nn.Module) -> bool:
    if type(module).forward is nn.Module.forward:  # ModuleList, ModuleDict: nobody calls it
        return True
    return isinstance(module, nn.Sequential) and not all(_is_layer(child) for child in module)


def _checkpointed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain_forward = type(self).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain_forward(self, *args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_spared(self)

    if not (self.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _buffers_spared(block: nn.Module) -> Generator[None]:
    """Recompute on copies of the buffers, so that running statistics count a batch once.

    Switching track_running_stats off instead saves fewer tensors than forward did, which
    torch.utils.checkpoint refuses.
    """
    spared = [
        (module, name, buffer)
        for module in block.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in spared:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in spared:
            setattr(module, name, buffer)
