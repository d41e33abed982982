"""Delivery of a run's points to one tracker, on a thread of its own. Whatever happens there, training continues."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from ftexp.config.masking import masked
from ftexp.trackers.registry import Key, Outcome, Point, Tracker
from ftexp.wire.events import TrackerFailed, TrackerOpened

_MAX_WAITING = 10_000  # points in memory; any more are read from the run directory later
_MAX_REASON_CHARS = 500  # limit of a reason in an event
_BATCH = 500  # points per call of a tracker
_RETRY_S = (5.0, 15.0, 60.0)  # pauses between tries with a failing tracker; the last one repeats

Report = Callable[[TrackerOpened | TrackerFailed], object]


class Follower:
    """Thread that keeps one tracker up to date with the run's points.

    A tracker that fails is created again, asked for what it has, and given the rest. So points that were sent, but
    perhaps did not arrive, are neither lost nor duplicated.

    Args:
        name: name of the tracker.
        make: finds or creates the tracker's run; may take time, and may raise.
        points: reads all points of the run so far.
        report: called when the tracker was opened or has failed; returns False if nobody listens any more.
        retry_s: pauses after the first failure in a row, after the second, and so on.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        points: Callable[[], Iterable[Point]],
        report: Report,
        retry_s: tuple[float, ...] = _RETRY_S,
    ) -> None:
        self.name = name
        self._make, self._points, self._report, self._retry_s = make, points, report, retry_s
        self._changed = threading.Condition()
        self._waiting: deque[Point] = deque()
        self._overflowed = False  # whether some points are only in the run directory
        self._held: set[Key] = set()  # keys that the tracker is known to have
        self._outcome: Outcome | None = None
        self._problem: str | None = None  # why it is down; None while it works
        self.complete = False  # whether it has all points and the outcome
        self.unheard: TrackerOpened | None = None  # its opening, if nobody listened any more
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True, name=f"tracker-{name}").start()

    def offer(self, point: Point) -> None:
        """Add a logged point, without waiting."""
        with self._changed:
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.append(point)
            else:
                self._overflowed = True
            self._changed.notify()

    def end(self, outcome: Outcome) -> None:
        """Set the outcome after the last point, without waiting."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify()

    def wait(self, timeout_s: float) -> TrackerFailed | None:
        """Wait after `end`; return None once the tracker has everything, otherwise the event with what it lacks."""
        self._stopped.wait(timeout_s)
        if self.complete:
            return None
        return self._failure(self._problem or "it has not answered in time")

    def _run(self) -> None:
        self._try_until_the_end()
        self._stopped.set()

    def _try_until_the_end(self) -> None:
        num_failures = 0
        while True:
            is_last_try = self._outcome is not None
            try:
                self._follow()
                self.complete = True
                return
            # any error: nothing else would report it on this thread, and a tracker is third-party code
            except Exception as error:
                num_failures = 1 if self._problem is None else num_failures + 1
                self._fail(f"{type(error).__name__}: {error}")
            if is_last_try:
                return
            pause_s = self._retry_s[min(num_failures, len(self._retry_s)) - 1]
            with self._changed:
                self._changed.wait_for(lambda: self._outcome is not None, pause_s)

    def _fail(self, problem: str) -> None:
        was_well, self._problem = self._problem is None, problem
        if was_well:  # further failures in a row are not reported
            self._report(self._failure(problem))

    def _failure(self, problem: str) -> TrackerFailed:
        num_undelivered = sum(not point.keys() <= self._held for point in self._points())
        reason = masked(" ".join(problem.split()))[:_MAX_REASON_CHARS]
        return TrackerFailed(self.name, reason, num_undelivered)

    def _follow(self) -> None:
        tracker = self._make()
        self._held = set(tracker.held())
        self._deliver(tracker, self._points())
        self._problem = None
        opened = TrackerOpened(self.name, masked(tracker.where))
        self.unheard = opened if self._report(opened) is False else None
        while points := self._next():
            if self._overflowed:
                self._overflowed = False
                self._deliver(tracker, self._points())
            self._deliver(tracker, points)
        assert self._outcome is not None, "that is what ended the loop"
        tracker.close(self._outcome)

    def _next(self) -> list[Point]:
        """Wait for new points and return them; empty once the run has ended and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._outcome is not None)
            points = list(self._waiting)
            self._waiting.clear()
            return points

    def _deliver(self, tracker: Tracker, points: Iterable[Point]) -> None:
        """Send the tracker what it lacks, once: the same point may come from the run directory and from memory."""
        missing, known = list[Point](), set(self._held)
        for point in points:
            if (left := point.without(known)).values:
                missing.append(left)
                known |= left.keys()
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            tracker.log(batch)
            self._held.update(*(point.keys() for point in batch))


def described(event: TrackerOpened | TrackerFailed) -> str:
    """Return an event as a line for the user."""
    if isinstance(event, TrackerOpened):
        return f"{'tracker':<9}{event.tracker}: {event.where}"
    return (
        f"! tracker {event.tracker}: {event.reason}; nothing else is affected; the points that it lacks "
        f"({event.num_undelivered} now) are sent when it is back, or when the same command runs again"
    )
