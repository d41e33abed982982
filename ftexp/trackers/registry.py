"""The interface of a tracker, and the names for `tracker=...`. Imports no tracker's package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ftexp.config.tracker_schema import TrackerConfig
from ftexp.registry import Registry

if TYPE_CHECKING:
    from ftexp.trackers.figures import Figure

Key = tuple[str, int]  # name of a metric, and step: a tracker must have each exactly once
_HEAD = ("time", "split", "step", "epoch")


@dataclass(frozen=True)
class Point:
    """A line of metrics.jsonl. Values that aren't finite are excluded: not every tracker can hold them."""

    time: float  # seconds since 1970
    split: str
    step: int
    epoch: int
    values: Mapping[str, float]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Point:
        """The point that a line of metrics.jsonl holds."""
        numbers = {name: value for name, value in line.items() if name not in _HEAD and isinstance(value, (int, float))}
        values = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        return cls(line["time"], line["split"], line["step"], line["epoch"], values)

    def keys(self) -> set[Key]:
        """(metric, step) of each of its values."""
        return {(name, self.step) for name in self.values}

    def without(self, held: set[Key]) -> Point:
        """The point without the values that a tracker has already."""
        left = {name: value for name, value in self.values.items() if (name, self.step) not in held}
        return Point(self.time, self.split, self.step, self.epoch, left)


def _no_figures() -> list[Figure]:
    return []


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Facts of a run, or of a whole sweep, for opening a tracker."""

    id: str  # the same for every attempt and every call of the command; no other run has it
    name: str
    uri: str  # the run directory; may hold a password, which tags["run_dir"] doesn't
    storage: str  # run.storage, which holds it
    params: dict[str, Any]  # the resolved config by dotted keys, secrets masked
    tags: dict[str, str]  # run_dir, git_commit, sweep, and those of the config
    started: float  # seconds since 1970
    sweep: str | None = None  # the name of the sweep that it is a trial of
    sweep_id: str | None = None  # `id` of the TrackedRun of the sweep
    figures: Callable[[], list[Figure]] = _no_figures  # how it stands at this moment; from any thread
    ray_address: str | None = None  # scaling.address: the cluster that it joins; None: it has a Ray of its own


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of the command ended."""

    status: str  # finished, failed or interrupted
    tags: dict[str, str] = field(default_factory=dict)  # checkpoint, best_checkpoint, goodput, failures, ...
    metrics: dict[str, float] = field(default_factory=dict)  # the last of each


class Tracker(Protocol):
    """One run in one tracker. Made by `Tracker(config, run)` on a thread of its own, where it may take its time.

    Making it finds the run by `run.id`, or begins it. Any method may raise: the tracker is then made again, later, and
    asked again what it holds. So `held` must return what the tracker really has, whatever was killed or lost when.
    """

    where: str  # for people: a directory, an address

    def held(self) -> Iterable[Key]:
        """Return the points of this run that it has already."""

    def log(self, points: Sequence[Point]) -> None:
        """Keep the points, for good once this returns."""

    def close(self, outcome: Outcome) -> None:
        """The command ends."""


@dataclass(frozen=True)
class Registered:
    """A class of trackers."""

    make: Callable[[TrackerConfig, TrackedRun], Tracker]
    package: str | None  # that must be installed; None: nothing besides ftexp
    has_parents: bool  # whether a sweep is a run of its own there
    keeps: bool = True  # points, for good; False: it shows the present, so a run that has ended has nothing for it


C = TypeVar("C", bound=Callable[[TrackerConfig, TrackedRun], Tracker])

trackers: Registry[Registered] = Registry("tracker.use")


def register_tracker(
    name: str, package: str | None = None, has_parents: bool = False, keeps: bool = True
) -> Callable[[C], C]:
    """Class decorator: makes a `Tracker` available to `tracker.use` under `name`."""

    def decorate(tracker_class: C) -> C:
        trackers.register(name)(Registered(tracker_class, package, has_parents, keeps))
        return tracker_class

    return decorate
