"""Early stopping by asynchronous successive halving (ASHA, Li et al. 2020, arXiv:1810.05934).

The rule is that of Ray Tune's ASHAScheduler: at a rung, a trial needs the interpolated percentile of those before it.
Optuna's SuccessiveHalvingPruner takes whole reduction factors of 2 or more only, and would continue other trials.

What `Halving` holds, the values that trials had when they first reached a rung, follows from the points that it is fed,
in that order: a sweep that is resumed feeds it the curves that are on disk, and needs no snapshot of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def rungs(grace_epochs: int, reduction_factor: float, max_epochs: int) -> list[float]:
    """Return the epochs at which trials are compared: grace_epochs * reduction_factor**k, below `max_epochs`."""
    found, epoch = [], float(grace_epochs)
    while epoch < max_epochs:
        found.append(epoch)
        epoch *= reduction_factor
    return found


class Halving:
    """Decides which trials continue beyond a rung: those not worse than the best 1 in `reduction_factor` so far."""

    def __init__(self, mode: str, grace_epochs: int, reduction_factor: float, max_epochs: int) -> None:
        self._sign = 1 if mode == "max" else -1
        self._max_epochs = max_epochs
        self._percentile = (1 - 1 / reduction_factor) * 100
        self._num_taken: dict[str, int] = {}
        # rungs, the highest first: the epoch of each, and the value of each trial that has reached it
        self._rungs: list[tuple[float, dict[str, float]]] = [
            (epoch, {}) for epoch in reversed(rungs(grace_epochs, reduction_factor, max_epochs))
        ]

    def take(self, name: str, curve: Sequence[tuple[int, float]]) -> None:
        """Take the new (epoch, value) points of a trial that has ended."""
        for _ in self._decisions(name, curve):
            pass

    def decide(self, name: str, curve: Sequence[tuple[int, float]]) -> int | None:
        """Decide as `take` for an unfinished trial; return the epoch whose value says to stop it, None to continue.

        What comes after that epoch isn't taken: it may be there, since a trial doesn't wait for the decision.
        """
        return next((epoch for epoch, stops in self._decisions(name, curve) if stops), None)

    def _decisions(self, name: str, curve: Sequence[tuple[int, float]]) -> Iterator[tuple[int, bool]]:
        for epoch, value in curve[self._num_taken.get(name, 0) :]:
            self._num_taken[name] = self._num_taken.get(name, 0) + 1
            if epoch < self._max_epochs:  # else it has done what there is to do
                yield epoch, self._is_behind(name, epoch, self._sign * value)

    def _is_behind(self, name: str, epoch: int, value: float) -> bool:
        """Return whether a trial that has just reached a rung is worse there than it must be.

        A greater value is better.
        """
        values = next((values for rung, values in self._rungs if epoch >= rung), None)
        if values is None or name in values:
            return False
        others = list(values.values())
        values[name] = value
        return bool(others) and bool(value < np.nanpercentile(others, self._percentile))
