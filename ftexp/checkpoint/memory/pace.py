"""The times at which snapshots are due: every rank decides the same at the same step."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

# target share of the time for snapshots if memory_every_steps is auto; with unmeasured costs, such as cold caches,
# snapshots cost at most 0.01
SHARE = 0.008
_FIRST_AFTER_STEPS = 10  # steps before an attempt's first snapshot, if auto: the first steps are slower
_NUM_STEPS_SEEN = 15
_NUM_COSTS_SEEN = 5
_MAX_WAIT_STEPS = 64  # maximum number of steps before a postponed snapshot is tried again


class Pace:
    """Decides after which steps a snapshot is due.

    Args:
        every_steps: steps between snapshots; None: chosen so that their cost is SHARE of the time.
        agree: returns rank 0's number on every rank; collective.
        clock: returns seconds.
    """

    def __init__(
        self, every_steps: int | None, agree: Callable[[int], int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._every, self._agree, self._clock = every_steps, agree, clock
        self._due_at: int | None = None
        self._wait_steps = 1
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS_SEEN)  # seconds of the last steps
        self._since = clock()
        self._costs: deque[float] = deque(maxlen=_NUM_COSTS_SEEN)  # seconds of the last snapshots
        self.interval = every_steps or 0  # steps between snapshots

    def step_done(self, step: int) -> bool:
        """Return whether a snapshot is due after `step`, the last one done."""
        now = self._clock()
        self._steps.append(now - self._since)
        self._since = now
        if self._due_at is None:
            # multiples of `every`, counted from step 0, as for checkpoints
            self._due_at = step + _FIRST_AFTER_STEPS if self._every is None else -(-step // self._every) * self._every
        return step >= self._due_at

    def postpone(self, step: int) -> None:
        """Make the snapshot due a little later, since it can't be taken now."""
        self._due_at = step + self._wait_steps
        self._wait_steps = min(2 * self._wait_steps, self._every or _MAX_WAIT_STEPS)
        self._resume()

    def taken(self, step: int, cost_s: float) -> None:
        """Schedule the next snapshot by the cost of the last ones; collective. cost_s: of the snapshot of `step`."""
        self._costs.append(cost_s)
        self._wait_steps = 1
        if self._every is None:
            self.interval = self._agree(max(1, math.ceil(self.cost_s / (SHARE * max(self.step_s, 1e-6)))))
            self._due_at = step + self.interval
        else:
            self._due_at = (step // self._every + 1) * self._every
        self._resume()

    def _resume(self) -> None:
        """Exclude the time since the last step from the next one."""
        self._since = self._clock()

    @property
    def cost_s(self) -> float:
        """Seconds of a snapshot: the median of the last ones, which a briefly busy machine doesn't change."""
        return statistics.median(self._costs) if self._costs else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a step: the median of the last ones, which evaluations and checkpoints don't change."""
        return statistics.median(self._steps) if self._steps else 0.0
