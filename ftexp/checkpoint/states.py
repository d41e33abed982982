"""The built-in states: progress, scheduler, scaler, ema, distill, rng, best, hooks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ftexp.checkpoint.registry import StateContext, register_state
from ftexp.wire import events
from ftexp.wire.messages import Happened

HOOKS = "hooks"  # added to checkpoint.extra_state if a run has hooks or early stopping


@register_state("progress")
class ProgressState:
    """Epoch, step, position, metrics, pending evaluations, and the sums since the last logged point."""

    version = 1

    def __init__(self, context: StateContext) -> None:
        self._context = context

    def state_dict(self) -> dict[str, Any]:
        return self._context.progress.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._context.progress.load_state_dict(state, self._context.rank)


@register_state("scheduler")
class SchedulerState:
    """Position in the schedule. Its shape comes from the config, since train.epochs may have been raised."""

    version = 1

    def __init__(self, context: StateContext) -> None:
        self._context = context

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self._context.progress.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # the optimiser's state is loaded already, with the learning rates of the checkpoint
        before = [group["lr"] for group in self._context.optimizer.param_groups]
        self._context.scheduler.step_update(state["num_updates"])
        after = [group["lr"] for group in self._context.optimizer.param_groups]
        if before != after and self._context.rank == 0:
            changed = events.LearningRateChanged(state["num_updates"], max(before), max(after))
            self._context.channel.send(Happened(changed))


@register_state("scaler")
class ScalerState:
    """The fp16 loss scale, its growth counter, and the number of skipped steps; empty in other precisions."""

    version = 2

    def __init__(self, context: StateContext) -> None:
        self._context = context

    def state_dict(self) -> dict[str, Any]:
        state = dict(self._context.scaler.state_dict())
        return {**state, "num_overflows": self._context.progress.num_overflows} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self._context.scaler.is_enabled():
            self._context.progress.num_overflows = state["num_overflows"]
            self._context.scaler.load_state_dict({key: state[key] for key in state if key != "num_overflows"})

    @staticmethod
    def migrate(state: dict[str, Any], version: int) -> dict[str, Any]:  # noqa: ARG004 - there is one older version
        """Add the number of skipped steps, which version 1 lacks."""
        return {**state, "num_overflows": 0} if state else {}


@register_state("ema")
class EmaState:
    """The EMA of the weights, as a state dict of the bare model under "weights"; empty without an EMA.

    Its decay depends on the run's step, so it has no step of its own.
    """

    version = 1
    optional = True  # checkpoints from before EMA existed have none

    def __init__(self, context: StateContext) -> None:
        self._context = context

    def state_dict(self) -> dict[str, Any]:
        ema = self._context.ema
        return {} if ema is None else {"weights": dict(ema.model.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._context.ema is not None:
            self._context.ema.model.load_state_dict(state["weights"])


@register_state("distill")
class DistillState:
    """The projection of features to a teacher's width, as a state dict; empty without a projection."""

    version = 1
    optional = True  # checkpoints from before teachers existed have none

    def __init__(self, context: StateContext) -> None:
        self._projection = context.projection

    def state_dict(self) -> dict[str, Any]:
        return {} if self._projection is None else {"projection": dict(self._projection.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._projection is not None:
            self._projection.load_state_dict(state["projection"])


@register_state("rng")
class RngState:
    """Random generators of Python, numpy and torch on rank 0, for user code that draws from them.

    ftexp itself doesn't need them: its random numbers are a function of seed, position, step and rank.
    """

    version = 1

    def __init__(self, context: StateContext) -> None:
        self._rank = context.rank

    def state_dict(self) -> dict[str, Any]:
        _, keys, place, has_gauss, gauss = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(gauss)),
            "torch": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._rank != 0:  # only the generators of rank 0 are saved, and other ranks must not copy them
            return
        keys, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])


@register_state("best")
class BestState:
    """The best value so far of `checkpoint.checkpoint_score_attribute`, and its step."""

    version = 1

    def __init__(self, context: StateContext) -> None:
        self._context = context

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._context.progress.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._context.progress.best = dict(state["best"])


@register_state(HOOKS)
class HooksState:
    """The states of the hooks, and whether one of them has stopped the run."""

    version = 1
    optional = True  # a run may add or remove hooks

    def __init__(self, context: StateContext) -> None:
        self._hooks = context.hooks

    def state_dict(self) -> dict[str, Any]:
        return self._hooks.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hooks.load_state_dict(state)
