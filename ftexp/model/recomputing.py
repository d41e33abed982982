"""Blocks whose activations are computed again in the backward pass instead of being kept until then."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

_is_off = False  # while operations are counted


def recompute(blocks: Sequence[nn.Module], setting: str) -> None:
    """Have some of the blocks compute their activations again; setting: `train.checkpoint_activations`.

    Outputs, gradients and batch norm's statistics are the same bits as without. A block becomes one of a subclass, so
    that a copy of the model computes with its own weights, and names of modules stay as they are.
    """
    if setting == "none":
        return
    every = 1 if setting == "blocks" else int(setting.removeprefix("every_"))
    for block in blocks[::every]:
        block.__class__ = _recomputing(type(block))  # type: ignore[arg-type]  # classes do have hashes


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """Keep activations meanwhile, as if nothing was to be computed again."""
    global _is_off
    _is_off = True
    try:
        yield
    finally:
        _is_off = False


class _Recomputing(nn.Module):
    """Mixin that makes a class of blocks compute twice."""

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
    """Return the contexts of the first and of the second computation."""
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Have batch norm leave its running statistics as they are: the first computation has counted the batch.

    By a momentum of 0. To put them back afterwards would count as a change of what the backward pass still wants.
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
