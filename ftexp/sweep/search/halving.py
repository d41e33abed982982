"""Early stopping by asynchronous successive halving (ASHA, Li et al. 2020, arXiv:1810.05934).

The rule is Ray Tune's ASHAScheduler's: at a rung, a trial must reach the interpolated percentile of those before it.
Optuna's SuccessiveHalvingPruner accepts only integer reduction factors of 2 or more, and would continue other trials.

`Halving` keeps the value that each trial had when it first reached a rung. This depends only on the points that it is
given and on their order. So a resumed sweep feeds it the curves on disk, and needs no snapshot of it.
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
    """Decision which trials continue beyond a rung: those not worse than the best 1 in `reduction_factor` so far."""

    def __init__(self, mode: str, grace_epochs: int, reduction_factor: float, max_epochs: int) -> None:
        self._sign = 1 if mode == "max" else -1
        self._max_epochs = max_epochs
        self._percentile = (1 - 1 / reduction_factor) * 100
        self._num_taken: dict[str, int] = {}
        # rungs, highest first: (epoch, {trial: value when it reached the rung})
        self._rungs: list[tuple[float, dict[str, float]]] = [
            (epoch, {}) for epoch in reversed(rungs(grace_epochs, reduction_factor, max_epochs))
        ]

    def take(self, name: str, curve: Sequence[tuple[int, float]]) -> None:
        """Add the new (epoch, value) points of a trial that has ended."""
        for _ in self._decisions(name, curve):
            pass

    def decide(self, name: str, curve: Sequence[tuple[int, float]]) -> int | None:
        """Add an unfinished trial's new points; return the epoch whose value says to stop it, or None to continue.

        Points after that epoch aren't added; there may be some, since a trial doesn't wait for the decision.
        """
        return next((epoch for epoch, stops in self._decisions(name, curve) if stops), None)

    def _decisions(self, name: str, curve: Sequence[tuple[int, float]]) -> Iterator[tuple[int, bool]]:
        for epoch, value in curve[self._num_taken.get(name, 0) :]:
            self._num_taken[name] = self._num_taken.get(name, 0) + 1
            if epoch < self._max_epochs:  # otherwise it has finished
                yield epoch, self._is_behind(name, epoch, self._sign * value)

    def _is_behind(self, name: str, epoch: int, value: float) -> bool:
        """Return whether a trial has just reached a rung and is too bad to continue. Greater values are better."""
        values = next((values for rung, values in self._rungs if epoch >= rung), None)
        if values is None or name in values:
            return False
        others = list(values.values())
        values[name] = value
        return bool(others) and bool(value < np.nanpercentile(others, self._percentile))
