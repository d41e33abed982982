"""Timeline of a run, from its events: the phase of every second."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Any

from ftexp.report.source import Record, RunFiles

# phases of an invocation, in order; run.json has DETECTING, RESTARTING and RESTORING of each failure
STARTING, DETECTING, RESTARTING, RESTORING = "starting", "detecting", "restarting", "restoring"
REPLAYING, TRAINING, ENDING = "replaying", "training", "ending"
PHASES = {
    TRAINING: "new steps, with evaluation and saving",
    REPLAYING: "lost steps, repeated",
    DETECTING: "from a failure, or the last sign of life, to its detection by Ray",
    RESTARTING: "from detection to new workers",
    RESTORING: "building the model and reading the checkpoint, to the first batch",
    STARTING: "from the start of the driver to its first workers",
    ENDING: "the test evaluation and shutdown",
}
_ENDS = ("finished", "failed", "interrupted")


@dataclass(frozen=True)
class Segment:
    """A time interval. Times in seconds since 1970."""

    phase: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.end - self.begin


@dataclass
class Interruption:
    """One failure, or end of an invocation, and its cost."""

    at: float  # when the first process died; seconds since 1970
    step: int
    cause: str
    rank: int | None = None
    error: str = ""
    decision: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # seconds lost, by phase
    steps_replayed: int | None = None  # None: the run didn't continue
    restored: str | None = None  # name of the checkpoint
    recovery: str | None = None  # source of the next state: replaced, memory, storage or start

    @property
    def lost_s(self) -> float:
        """Total cost in seconds."""
        return sum(self.seconds.values())

    def spent_on(self, *phases: str) -> float:
        """Return the seconds lost in these phases."""
        return sum(self.seconds.get(phase, 0.0) for phase in phases)


@dataclass
class Invocation:
    """One invocation, from its start to its last sign of life."""

    begin: float
    end: float


@dataclass
class Timeline:
    """A run's time, without the time between invocations."""

    invocations: list[Invocation]
    segments: list[Segment] = field(default_factory=list)
    interruptions: list[Interruption] = field(default_factory=list)
    attempts: list[tuple[int, float]] = field(default_factory=list)  # (step before its first new one, time when ready)

    @property
    def total_s(self) -> float:
        """Seconds during which an invocation was running."""
        return sum(invocation.end - invocation.begin for invocation in self.invocations)

    def running_s(self, when: float) -> float:
        """Return how many of these seconds had passed at a time in seconds since 1970."""
        return sum(
            min(max(when - invocation.begin, 0.0), invocation.end - invocation.begin) for invocation in self.invocations
        )

    def seconds_by_phase(self) -> dict[str, float]:
        """Return the total seconds of each phase."""
        sums = dict.fromkeys(PHASES, 0.0)
        for segment in self.segments:
            sums[segment.phase] += segment.seconds
        return sums


def build_timeline(run: RunFiles) -> Timeline:
    """Build the timeline from a run's events."""
    if not run.events:
        return Timeline([])
    starts = sorted({run.events[0]["time"], *(event["time"] for event in run.named("command_started"))})
    times = sorted([event["time"] for event in run.events] + [point["time"] for point in run.points])
    invocations = []
    for begin, after in zip(starts, [*starts[1:], float("inf")], strict=True):
        invocations.append(Invocation(begin, times[bisect.bisect_left(times, after) - 1]))  # to the last sign of life
    follower = _Follower(Timeline(invocations))
    for invocation in invocations:
        events, points = (
            [one for one in lines if invocation.begin <= one["time"] <= invocation.end]
            for lines in (run.events, run.points)
        )
        follower.follow(invocation, events, points)
    return follower.timeline


class _Follower:
    """Builder of the timeline from the events of one invocation after another."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._phase, self._since = STARTING, 0.0
        self._farthest = 0  # highest step done so far
        self._open: Interruption | None = None  # interruption whose lost steps are not all repeated yet

    def follow(self, invocation: Invocation, events: list[Record], points: list[Record]) -> None:
        """Add an invocation's events to the timeline."""
        self._phase, self._since = STARTING, invocation.begin
        end = next((event for event in reversed(events) if event["event"] in _ENDS), None)
        for event in events:
            if event is end:
                self._end(event, points)
            handler = getattr(self, f"_on_{event['event']}", None)
            if handler is not None:
                handler(event)
            if event["event"] != "ready":  # its step is the one that the attempt resumes from
                self._farthest = max(self._farthest, event.get("step") or 0)
        self._close(self._phase, invocation.end)
        self._farthest = max([self._farthest, *(point["step"] for point in points)])
        cause = end["event"] if end is not None else "driver died"
        # if the invocation failed, the failure that ended it already is an interruption
        if invocation is not self.timeline.invocations[-1] and cause not in ("finished", "failed"):
            self._open = Interruption(invocation.end, self._farthest, cause, decision="the command was run again")
            self.timeline.interruptions.append(self._open)

    def _close(self, phase: str, until: float) -> None:
        """End the current phase."""
        seconds = until - self._since
        if seconds <= 0:
            return
        self.timeline.segments.append(Segment(phase, self._since, until))
        self._since = until
        if self._open is not None and phase not in (TRAINING, ENDING):
            self._open.seconds[phase] = self._open.seconds.get(phase, 0.0) + seconds

    def _on_attempt_started(self, event: Record) -> None:
        self._close(self._phase, event["time"])
        self._phase = RESTORING

    _on_worker_replaced = _on_attempt_started

    def _on_restored(self, event: Record) -> None:
        if self._open is not None:
            self._open.restored = event.get("checkpoint")

    def _on_ready(self, event: Record) -> None:
        self._close(self._phase, event["time"])
        self.timeline.attempts.append((max(event["step"], self._farthest), event["time"]))
        if self._open is not None:
            self._open.steps_replayed = max(0, self._open.step - event["step"])
            before = "start" if self._open.restored is None else "storage"  # for older records, which have no source
            self._open.recovery = event.get("source") or before
        self._phase = REPLAYING if event["step"] < self._farthest else TRAINING
        if self._phase == TRAINING:
            self._open = None

    def _on_caught_up(self, event: Record) -> None:
        self._close(self._phase, event["time"])
        self._phase, self._open = TRAINING, None

    def _on_failure(self, event: Record) -> None:
        detect_s = event.get("seconds_to_detect") or 0.0
        self._close(self._phase, event["time"] - detect_s)
        self._open = Interruption(
            self._since, event["step"], event["cause"], event.get("rank"), event["error"], event.get("decision", "")
        )
        self.timeline.interruptions.append(self._open)
        self._close(DETECTING, event["time"])
        self._phase = RESTARTING

    def _end(self, event: Record, points: list[Record]) -> None:
        if event["event"] == "finished":
            trained = [point["time"] for point in points if point["split"] != "test"]
            self._close(self._phase, max(trained, default=self._since))
        if event["event"] == "finished" or self._phase == RESTARTING:
            self._phase = ENDING


def saves(run: RunFiles) -> list[tuple[float, float, dict[str, Any]]]:
    """Return (begin, end, event) of every saved checkpoint."""
    return [
        (event["time"] - event.get("write_s", 0.0), event["time"], event) for event in run.named("checkpoint_saved")
    ]
