"""Time accounting of a run: the cost of its failures, and the time spent on new steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ftexp.rundir.state import Failure, RunState
from ftexp.wire.events import CaughtUp, Event, Recovered


class RunClock:
    """Clock that keeps the times in a run's state.

    Args:
        state: modified in place.
        now: clock in seconds since 1970, for dates.
        steady: monotonic clock in seconds, for durations.
        noticed_at: when the process noticed that its Ray had died, before it restarted with a new one; None: it didn't.
    """

    def __init__(
        self, state: RunState, now: Callable[[], float], steady: Callable[[], float], noticed_at: float | None
    ) -> None:
        self._state, self.now, self._steady = state, now, steady
        self.noticed_at = noticed_at  # detection of the last failure, by `now`
        self._noticed = self._since(now() if noticed_at is None else noticed_at)  # the same, by `steady`
        self._began, self._seconds_before = self._noticed, state.seconds
        self._died_at: float | None = None  # when the first process of the current attempt died or raised
        self._heard_at: float | None = None  # last sign of life of an attempt that trains
        self._farthest_before = state.farthest_step  # farthest step when the current attempt started
        self._working_since = steady()  # end of the last interval that was counted as productive or lost
        self._attempt_since = steady()
        self._replayed_from: int | None = None  # step that the attempt resumed from, while it replays steps
        self._recovering: Failure | None = None  # last failure, until a new step is done
        self._ready_since = steady()

    def attempt_started(self) -> float:
        """Note that rank 0 of a new worker group, or a replacement, has connected; return the time."""
        self._died_at, self._farthest_before = None, self._state.farthest_step
        failures, self._attempt_since = self._state.failures, self._steady()
        if failures and failures[-1].seconds_to_restart is None and self.noticed_at is not None:
            failures[-1].seconds_to_restart = round(self._attempt_since - self._noticed, 3)
        return self.now()

    def ready(self, step: int, source: str) -> float:
        """Note that training starts after `step`, from a state of that source; return the time."""
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
        """Note that `step` is done; return events if all lost steps have been repeated."""
        state, now, caught_up = self._state, self._steady(), list[Event]()
        if step > state.farthest_step:
            if self._replayed_from is not None:
                caught_up.append(CaughtUp(state.farthest_step, self._replayed_from))
                self._replayed_from = None
            if self._recovering is not None:
                caught_up.append(self._recovered(self._recovering, now))
                self._recovering = None
            state.productive_s += now - self._working_since
        if step != state.step:  # if a step is reported again, the time counts for the next step
            self._working_since = now
        state.step, state.epoch, state.farthest_step = step, epoch, max(step, state.farthest_step)
        return caught_up

    def _recovered(self, failure: Failure, now: float) -> Recovered:
        failure.seconds_to_new_step = round(now - self._ready_since, 3)
        return Recovered(**{each.name: getattr(failure, each.name) for each in dataclasses.fields(Recovered)})

    def heard(self) -> None:
        """Note a worker's sign of life."""
        if self._heard_at is not None:
            self._heard_at = self.now()

    def process_ended(self, when: float) -> None:
        """Note that a process of the current attempt was lost, or raised."""
        self._died_at = when if self._died_at is None else self._died_at

    def failed(self, reported_late: bool) -> float:
        """Note that the current attempt failed; return the seconds until this was detected.

        A node that loses power or network closes no connection: then the time since its last sign of life counts.

        reported_late: Ray knew at once, but did not report it; the process's death counts as the detection.
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
        """Whether the current attempt has done a new step."""
        return self._state.farthest_step > self._farthest_before

    def sum_up(self) -> None:
        """Update the state's seconds and goodput."""
        self._state.seconds, self._state.goodput = self._seconds(), self.goodput()

    def goodput(self) -> float | None:
        """Return the share of the run's seconds so far that was spent on new steps; None at its start."""
        seconds = self._seconds()
        return round(self._state.productive_s / seconds, 4) if seconds else None

    def _seconds(self) -> float:
        return self._seconds_before + self._steady() - self._began

    def _since(self, when: float) -> float:
        """Convert a recent time of `now` to the steady clock."""
        return self._steady() - max(0.0, self.now() - when)
