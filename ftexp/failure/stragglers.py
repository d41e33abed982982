"""Detection of stragglers: a function of each rank's own time in a step, without I/O."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# minimum of logged points, and of steps, in a row for a rank to become a straggler, or to stop being one
MIN_POINTS, MIN_STEPS = 3, 30

Times = Sequence[Sequence[float]]  # [ranks][parts], in any unit


@dataclass(frozen=True)
class Slow:
    """A rank that takes longer than the others."""

    rank: int
    part: int  # part in which it exceeds the median most
    ratio: float  # its time, as a multiple of the median


def totals(times: Times) -> list[float]:
    """Return each rank's time over all parts."""
    return [sum(parts) for parts in times]


def median(values: Sequence[float]) -> float:
    """Return the lower median: with the usual one, one of two ranks could never be twice as slow as the median."""
    return statistics.median_low(values)


def slow_ranks(times: Times, factor: float) -> list[Slow]:
    """Return the ranks whose time is more than `factor` times the median over ranks, by rank."""
    usual = median(totals(times))
    usual_parts = [median(part) for part in zip(*times, strict=True)]

    def worst(parts: Sequence[float]) -> int:
        return max(range(len(parts)), key=lambda part: parts[part] - usual_parts[part])

    return [
        Slow(rank, worst(times[rank]), total / usual)
        for rank, total in enumerate(totals(times))
        if usual > 0 and total > factor * usual
    ]


class Stragglers:
    """Stragglers of a worker group. A rank must stay slow to become one, and stay as fast as others to end it."""

    def __init__(self, factor: float, log_every_steps: int) -> None:
        self._factor = factor
        self._num_points = max(MIN_POINTS, math.ceil(MIN_STEPS / log_every_steps))
        self._ranks: set[int] = set()  # current stragglers
        self._since: Counter[int] = Counter()  # by rank: points in a row that contradict `_ranks`

    def note(self, times: Times) -> tuple[list[Slow], list[int]]:
        """Add a logged point; return the new stragglers, and the ranks that are no longer stragglers."""
        slow = {each.rank: each for each in slow_ranks(times, self._factor)}
        news = self._ranks ^ slow.keys()
        self._since = Counter({rank: self._since[rank] + 1 for rank in news})
        changed = {rank for rank in news if self._since[rank] >= self._num_points}
        self._ranks ^= changed
        for rank in changed:
            del self._since[rank]
        return [slow[rank] for rank in sorted(changed & slow.keys())], sorted(changed - slow.keys())
