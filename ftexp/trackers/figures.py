"""The current state of a run as values of the series, read from its records at any time, on any thread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftexp.config.schema import CAUSES
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import Failure
from ftexp.trackers import series
from ftexp.trackers.series import Series
from ftexp.wire.events import (
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    Event,
    Straggler,
    StragglerOver,
    make_event,
)

# name of a logged time, in ms -> series and value of its label `part`
_TIMES = {f"{part}_ms": (series.STEP_PART, part) for part in series.STEP_PARTS}
_TIMES |= {f"{part}_ms": (series.SAMPLE_PART, part) for part in series.SAMPLE_PARTS}
_TIMES |= {f"rank_ms_{ranks}": (series.RANK_STEP, ranks) for ranks in ("min", "median", "max")}
_OWN_SERIES = {
    "images_per_s": series.IMAGES,
    "mfu": series.MFU,
    "feed_queue": series.FEED_QUEUE,
    "slowest_rank": series.SLOWEST_RANK,
}
_HEAD = ("time", "event", "attempt")


@dataclass(frozen=True)
class Figure:
    """The current value of a series. `labels`: values of the series' own labels, in their order."""

    series: Series
    value: float
    labels: tuple[str, ...] = ()


class RunFigures:
    """The figures of one run. Created before it trains; counts include earlier invocations, from events.jsonl."""

    def __init__(self, record: RunRecord, model: str, data: str, run_dir: str) -> None:
        self._record, self._about = record, (model, data, run_dir)
        self._saved: dict[str, tuple[float, CheckpointSaved]] = {}  # name -> (time, event)
        self._last_blocked_s: float | None = None
        self._blocked_s, self._num_failed = 0.0, 0
        self._stragglers: dict[tuple[str, str, str], float] = {}  # (rank, node, part) -> ratio; 0 once it is over
        for line in record.past_events():
            self._take_line(line)
        record.observers.append(self._take)

    def __call__(self) -> list[Figure]:
        """Return the figures; a series that has no value yet is missing."""
        stragglers = [Figure(series.STRAGGLER, ratio, who) for who, ratio in self._stragglers.copy().items()]
        return [*self._progress(), *self._points(), *stragglers, *self._failures(), *self._checkpoints()]

    def _take_line(self, line: dict[str, Any]) -> None:
        if line.get("event") in ("checkpoint_saved", "checkpoint_failed"):
            fields = {key: value for key, value in line.items() if key not in _HEAD}
            self._take(make_event(line["event"], fields), line["time"])

    def _take(self, event: Event, when: float) -> None:
        """Count an event; called by the records, one at a time."""
        match event:
            case CheckpointSaved(checkpoint=name, blocked_s=blocked_s):
                self._saved[name] = (when, event)
                self._last_blocked_s, self._blocked_s = blocked_s, self._blocked_s + blocked_s
            case CheckpointFailed():
                self._num_failed += 1
            case Straggler(rank, part, ratio, node=node):
                self._stragglers[str(rank), node or "", part] = ratio
            case StragglerOver(rank):
                self._stragglers |= {who: 0.0 for who in self._stragglers if who[0] == str(rank)}
            case AttemptStarted():
                self._stragglers = dict.fromkeys(self._stragglers, 0.0)

    def _progress(self) -> Iterator[Figure]:
        record, state = self._record, self._record.state
        yield Figure(series.INFO, 1, self._about)
        yield Figure(series.ATTEMPTS, state.attempts)
        if state.world_sizes:
            yield Figure(series.WORKERS, state.world_sizes[-1])
        yield Figure(series.STEP, state.step)
        yield Figure(series.EPOCH, state.epoch)
        if (share := record.clock.goodput()) is not None:
            yield Figure(series.GOODPUT, share)
        if record.heard_at is not None:
            yield Figure(series.HEARTBEAT_AGE, max(0.0, record.clock.now() - record.heard_at))

    def _points(self) -> Iterator[Figure]:
        for name, value in self._record.state.metrics["last"].copy().items():
            if value is None or not math.isfinite(value):  # run.json has null for values that aren't
                continue
            if (own := _OWN_SERIES.get(name)) is not None:
                yield Figure(own, value)
            elif name in _TIMES:
                timed, part = _TIMES[name]
                yield Figure(timed, value / 1000, (part,))
            else:
                yield Figure(series.METRIC, value, (name,))

    def _failures(self) -> Iterator[Figure]:
        failures = list(self._record.state.failures)
        counts = Counter(failure.cause for failure in failures)
        for cause in sorted({*CAUSES, *counts}):  # including zeros: a rate needs a start value
            yield Figure(series.FAILURES, counts[cause], (cause,))
        yield Figure(series.REPLAYED, sum(failure.steps_replayed or 0 for failure in failures))
        yield Figure(series.RESTART, sum(map(_restart_s, failures)))

    def _checkpoints(self) -> Iterator[Figure]:
        saved = self._saved.copy()
        yield Figure(series.SAVES, len(saved))
        yield Figure(series.FAILED_SAVES, self._num_failed)
        yield Figure(series.BLOCKED_SUM, self._blocked_s)
        if self._last_blocked_s is not None:
            yield Figure(series.BLOCKED, self._last_blocked_s)
        name = self._record.state.checkpoint
        if name in saved:
            when, event = saved[name]
            yield Figure(series.CHECKPOINT_AGE, max(0.0, self._record.clock.now() - when))
            yield Figure(series.CHECKPOINT_BYTES, event.bytes)
            yield Figure(series.CHECKPOINT_STEP, event.step)


def _restart_s(failure: Failure) -> float:
    """Return the seconds that a failure has cost so far, without the repeated steps."""
    parts = (failure.seconds_to_detect, failure.seconds_to_restart, failure.seconds_to_restore)
    return sum(part for part in parts if part is not None)
