"""When a snapshot is due. Every rank comes to the same answer at the same step."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

# target share of the time for snapshots if memory_every_steps is auto; with what isn't measured, such as cold caches, a
# snapshot costs at most 0.01
SHARE = 0.008
_FIRST_AFTER_STEPS = 10  # steps of an attempt before the first, where it is auto: the first ones are slower
_NUM_STEPS_SEEN = 15
_NUM_COSTS_SEEN = 5
_MAX_WAIT_STEPS = 64  # before it is asked again whether a snapshot can be taken


class Pace:
    """Says after which steps a snapshot is due.

    Args:
        every_steps: steps between snapshots; None: as many as make their cost SHARE of the time.
        agree: returns rank 0's number on every rank; collective.
        clock: seconds.
    """

    def __init__(
        self, every_steps: int | None, agree: Callable[[int], int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._every, self._agree, self._clock = every_steps, agree, clock
        self._due_at: int | None = None
        self._wait_steps = 1
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS_SEEN)  # seconds
        self._since = clock()
        self._costs: deque[float] = deque(maxlen=_NUM_COSTS_SEEN)  # seconds
        self.interval = every_steps or 0  # steps to the next

    def step_done(self, step: int) -> bool:
        """Whether a snapshot is due after `step`, the last that was done."""
        now = self._clock()
        self._steps.append(now - self._since)
        self._since = now
        if self._due_at is None:
            # multiples of `every`, counted from step 0, as for checkpoints
            self._due_at = step + _FIRST_AFTER_STEPS if self._every is None else -(-step // self._every) * self._every
        return step >= self._due_at

    def postpone(self, step: int) -> None:
        """Let the next be due a little later: this one can't be taken now."""
        self._due_at = step + self._wait_steps
        self._wait_steps = min(2 * self._wait_steps, self._every or _MAX_WAIT_STEPS)
        self._resume()

    def taken(self, step: int, cost_s: float) -> None:
        """Let the next be due when that has become worth it. cost_s: of the snapshot of `step`; collective."""
        self._costs.append(cost_s)
        self._wait_steps = 1
        if self._every is None:
            self.interval = self._agree(max(1, math.ceil(self.cost_s / (SHARE * max(self.step_s, 1e-6)))))
            self._due_at = step + self.interval
        else:
            self._due_at = (step // self._every + 1) * self._every
        self._resume()

    def _resume(self) -> None:
        """Count what has passed since the step as no part of the next one."""
        self._since = self._clock()

    @property
    def cost_s(self) -> float:
        """Seconds of a snapshot: the median of the last, which a machine that was busy for a moment doesn't change."""
        return statistics.median(self._costs) if self._costs else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a step: the median of the last, which evaluations and checkpoints don't change."""
        return statistics.median(self._steps) if self._steps else 0.0
