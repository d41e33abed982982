"""Time accounting of a run: the cost of its failures, and the time spent on new steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ftexp.rundir.state import Failure, RunState
from ftexp.wire.events import CaughtUp, Event, Recovered


class RunClock:
    """Keeps the times in a run's state.

    Args:
        state: it is changed here.
        now: seconds since 1970, for what is dated.
        steady: seconds of a clock that nobody sets, for how long things took.
        noticed_at: when the command, before it began again with a new Ray, noticed that its first had died.
    """

    def __init__(
        self, state: RunState, now: Callable[[], float], steady: Callable[[], float], noticed_at: float | None
    ) -> None:
        self._state, self.now, self._steady = state, now, steady
        self.noticed_at = noticed_at  # the last failure, by `now`
        self._noticed = self._since(now() if noticed_at is None else noticed_at)  # the same, by `steady`
        self._began, self._seconds_before = self._noticed, state.seconds
        self._died_at: float | None = None  # when the first process of the current attempt died or raised
        self._heard_at: float | None = None  # the last sign of life of an attempt that trains
        self._farthest_before = state.farthest_step  # when the current attempt began
        self._working_since = steady()  # the end of what was last counted as productive, or lost
        self._attempt_since = steady()
        self._replayed_from: int | None = None  # the step that the attempt began at, while it replays
        self._recovering: Failure | None = None  # until a step is done that had never been done before
        self._ready_since = steady()

    def attempt_started(self) -> float:
        """Rank 0 of a new worker group has connected; returns the time."""
        self._died_at, self._farthest_before = None, self._state.farthest_step
        failures, self._attempt_since = self._state.failures, self._steady()
        if failures and failures[-1].seconds_to_restart is None and self.noticed_at is not None:
            failures[-1].seconds_to_restart = round(self._attempt_since - self._noticed, 3)
        return self.now()

    def ready(self, step: int, source: str) -> float:
        """Training begins after `step`, from a state of that source; returns the time."""
        failures = self._state.failures
        self._working_since = self._ready_since = self._steady()
        self._heard_at = self.now()
        self._replayed_from = step if step < self._state.farthest_step else None
        self._state.step = step
        if failures and failures[-1].steps_replayed is None and self.noticed_at is not None:
            self._recovering = failures[-1]
            failures[-1].seconds_to_restore = round(self._working_since - self._attempt_since, 3)
            failures[-1].steps_replayed = max(0, failures[-1].step - step)
            failures[-1].recovery = source
        return self.now()

    def reached(self, step: int, epoch: int) -> list[Event]:
        """`step` is done; returns events if everything that was lost has been done again."""
        state, now, caught_up = self._state, self._steady(), list[Event]()
        if step > state.farthest_step:
            if self._replayed_from is not None:
                caught_up.append(CaughtUp(state.farthest_step, self._replayed_from))
                self._replayed_from = None
            if self._recovering is not None:
                caught_up.append(self._recovered(self._recovering, now))
                self._recovering = None
            state.productive_s += now - self._working_since
        if step != state.step:  # at the same step, the time goes to the step that comes next
            self._working_since = now
        state.step, state.epoch, state.farthest_step = step, epoch, max(step, state.farthest_step)
        return caught_up

    def _recovered(self, failure: Failure, now: float) -> Recovered:
        failure.seconds_to_new_step = round(now - self._ready_since, 3)
        return Recovered(**{each.name: getattr(failure, each.name) for each in dataclasses.fields(Recovered)})

    def heard(self) -> None:
        """A worker gave a sign of life."""
        if self._heard_at is not None:
            self._heard_at = self.now()

    def process_ended(self, when: float) -> None:
        """A process of the current attempt was lost, or raised."""
        self._died_at = when if self._died_at is None else self._died_at

    def failed(self, reported_late: bool) -> float:
        """The current attempt failed; returns the seconds to detect it. `reported_late`: Ray knew when it began.

        A machine that loses its power, or its network, doesn't say so: then its silence counts.
        """
        self.noticed_at = self.now()
        died_at = next(when for when in (self._died_at, self._heard_at, self.noticed_at) if when is not None)
        if reported_late:
            self.noticed_at = died_at
        self._noticed = self._since(self.noticed_at)
        self._recovering = None
        # the next group may die before it says hello
        self._farthest_before, self._died_at, self._heard_at = self._state.farthest_step, None, None
        return round(max(0.0, self.noticed_at - died_at), 3)

    @property
    def has_progressed(self) -> bool:
        """Whether the current attempt has done a step that had never been done before."""
        return self._state.farthest_step > self._farthest_before

    def sum_up(self) -> None:
        """Bring the state's seconds and goodput up to date."""
        self._state.seconds, self._state.goodput = self._seconds(), self.goodput()

    def goodput(self) -> float | None:
        """Return the share of the run's seconds so far that went into steps not done before; None at its beginning."""
        seconds = self._seconds()
        return round(self._state.productive_s / seconds, 4) if seconds else None

    def _seconds(self) -> float:
        return self._seconds_before + self._steady() - self._began

    def _since(self, when: float) -> float:
        """Return what the steady clock showed at a time not long ago."""
        return self._steady() - max(0.0, self.now() - when)
