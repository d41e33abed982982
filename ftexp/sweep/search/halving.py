"""Early stopping by asynchronous successive halving (ASHA), as Ray Tune's scheduler decides it.

The scheduler is fed a trial's points in the order that they were logged, whenever they come. What it holds, the values
that trials had when they first reached a rung, follows from those points: a sweep that goes on feeds it the curves that
are on disk, and needs no snapshot of it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

_EPOCH, _OBJECTIVE = "epoch", "objective"


class Halving:
    """Which trials go on beyond a rung: those that are not worse than the best 1 in `reduction_factor` so far."""

    def __init__(self, mode: str, grace_epochs: int, reduction_factor: float, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self._num_taken: dict[str, int] = {}
        self._trials: dict[str, Any] = {}
        self._scheduler = AsyncHyperBandScheduler(
            time_attr=_EPOCH,
            metric=_OBJECTIVE,
            mode=mode,
            max_t=max_epochs,
            grace_period=grace_epochs,
            reduction_factor=reduction_factor,
            stop_last_trials=False,
        )

    def take(self, name: str, curve: Sequence[tuple[int, float]]) -> None:
        """Take what is new of the (epoch, value) points of a trial that has ended."""
        for _ in self._decisions(name, curve):
            pass

    def decide(self, name: str, curve: Sequence[tuple[int, float]]) -> int | None:
        """As `take`, of a trial that isn't done; the epoch whose value says to stop it, None to let it go on.

        What comes after that epoch isn't taken: it may be there, since a trial doesn't wait for the decision.
        """
        return next((epoch for epoch, stops in self._decisions(name, curve) if stops), None)

    def _decisions(self, name: str, curve: Sequence[tuple[int, float]]) -> Iterator[tuple[int, bool]]:
        if name not in self._trials:
            self._trials[name] = types.SimpleNamespace(trial_id=name)  # all that the scheduler reads of a trial
            self._scheduler.on_trial_add(None, self._trials[name])
        for epoch, value in curve[self._num_taken.get(name, 0) :]:
            self._num_taken[name] = self._num_taken.get(name, 0) + 1
            if epoch < self._max_epochs:  # else it has done what there is to do
                action = self._scheduler.on_trial_result(None, self._trials[name], {_EPOCH: epoch, _OBJECTIVE: value})
                yield epoch, action == TrialScheduler.STOP
