"""Activation checkpointing: blocks whose activations are recomputed in the backward pass instead of being kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_is_off = False  # true inside `computed_once`


def recompute(blocks: Sequence[nn.Module], setting: str) -> None:
    """Make blocks recompute their activations, as `setting` says: `train.checkpoint_activations`.

    Outputs, gradients and batch norm statistics are bitwise identical to those without. A block's class is replaced by
    a subclass, so that a copy of the model uses its own weights and the names of modules don't change.
    """
    if setting == "none":
        return
    every = 1 if setting == "blocks" else int(setting.removeprefix("every_"))
    for block in blocks[::every]:
        block.__class__ = _recomputing(type(block))  # type: ignore[arg-type]  # classes do have hashes


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """Disable recomputation in the context: all activations are kept."""
    global _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = False


class _Recomputing(nn.Module):
    """Mixin that makes a class of blocks recompute its activations."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if _is_off or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not any(isinstance(module, _BatchNorm) for module in self.modules()):
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        contexts = functools.partial(_contexts, self)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)  # type: ignore[arg-type]  # two contexts


@functools.cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputing, kind), {"__module__": kind.__module__})


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager[None], ...]:
    """Return the context of the first computation and that of the recomputation."""
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics unchanged, since the first computation has already counted the batch.

    Sets the momentum to 0. Restoring the statistics afterwards would modify tensors that the backward pass still needs.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
