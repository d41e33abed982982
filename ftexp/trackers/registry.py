"""The interface of a tracker, and the registry of `tracker.use`. Imports no tracker's package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ftexp.config.tracker_schema import TrackerConfig
from ftexp.registry import Registry

if TYPE_CHECKING:
    from ftexp.trackers.figures import Figure

Key = tuple[str, int]  # name of a metric, and step; a tracker must have each exactly once
_HEAD = ("time", "split", "step", "epoch")


@dataclass(frozen=True)
class Point:
    """A line of metrics.jsonl, without values that aren't finite: not every tracker accepts them."""

    time: float  # seconds since 1970
    split: str
    step: int
    epoch: int
    values: Mapping[str, float]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Point:
        """Return the point of a line of metrics.jsonl."""
        numbers = {name: value for name, value in line.items() if name not in _HEAD and isinstance(value, (int, float))}
        values = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        return cls(line["time"], line["split"], line["step"], line["epoch"], values)

    def keys(self) -> set[Key]:
        """Return (metric, step) of each value."""
        return {(name, self.step) for name in self.values}

    def without(self, held: set[Key]) -> Point:
        """Return the point without the values that a tracker already has."""
        left = {name: value for name, value in self.values.items() if (name, self.step) not in held}
        return Point(self.time, self.split, self.step, self.epoch, left)


def _no_figures() -> list[Figure]:
    return []


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Facts of a run, or of a whole sweep, for opening a tracker."""

    id: str  # the same for every attempt and invocation; unique to the run
    name: str
    uri: str  # the run directory; may contain a password, which tags["run_dir"] doesn't
    storage: str  # run.storage, which contains it
    params: dict[str, Any]  # the resolved config by dotted keys, secrets masked
    tags: dict[str, str]  # run_dir, git_commit, sweep, and the config's tags
    started: float  # seconds since 1970
    sweep: str | None = None  # name of the sweep that it is a trial of
    sweep_id: str | None = None  # `id` of the TrackedRun of the sweep
    figures: Callable[[], list[Figure]] = _no_figures  # returns its current figures; callable on any thread
    ray_address: str | None = None  # scaling.address: the cluster that it joins; None: its own Ray


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of an invocation."""

    status: str  # finished, failed or interrupted
    tags: dict[str, str] = field(default_factory=dict)  # checkpoint, best_checkpoint, goodput, failures, ...
    metrics: dict[str, float] = field(default_factory=dict)  # latest value of each


class Tracker(Protocol):
    """One run in one tracker. Created by `Tracker(config, run)` on its own thread, where every call may take time.

    The constructor finds the run by `run.id`, or creates it. Any method may raise: the tracker is then constructed
    again later, and `held` is called again. So `held` must return what the tracker really has, after any kill or loss.
    """

    where: str  # for the user: a directory, an address

    def held(self) -> Iterable[Key]:
        """Return the (metric, step) pairs of this run that the tracker already has."""

    def log(self, points: Sequence[Point]) -> None:
        """Store the points, durably once this returns."""

    def close(self, outcome: Outcome) -> None:
        """Record the outcome, at the end of the invocation."""


@dataclass(frozen=True)
class Registered:
    """A registered tracker class."""

    make: Callable[[TrackerConfig, TrackedRun], Tracker]
    package: str | None  # package that must be installed; None: none besides ftexp
    has_parents: bool  # whether a sweep is a run of its own there
    keeps: bool = True  # whether it stores points; False: it shows the current state, so an ended run needs no delivery


C = TypeVar("C", bound=Callable[[TrackerConfig, TrackedRun], Tracker])

trackers: Registry[Registered] = Registry("tracker.use")


def register_tracker(
    name: str, package: str | None = None, has_parents: bool = False, keeps: bool = True
) -> Callable[[C], C]:
    """Return a class decorator that makes a `Tracker` available to `tracker.use` under `name`."""

    def decorate(tracker_class: C) -> C:
        trackers.register(name)(Registered(tracker_class, package, has_parents, keeps))
        return tracker_class

    return decorate
