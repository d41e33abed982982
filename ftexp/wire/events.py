"""The schema of events.jsonl: one class for each event, whose name is the class's name in snake case.

A line holds `time`, `event` (the name), the run's `attempt` and `step` at that time, and the event's fields. An event's
own `step` replaces the run's. A field that has its default isn't written.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    @property
    def name(self) -> str:
        """The event's name in events.jsonl."""
        return snake_case(type(self))

    @property
    def fields(self) -> dict[str, Any]:
        """The event's fields in events.jsonl, without its name."""
        values = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in values if value != field.default}


def snake_case(kind: type) -> str:
    """Return the name of a class in snake case, as JSON lines use it."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


# The command


@dataclass(frozen=True)
class CommandStarted(Event):
    """An invocation has started."""

    changed: list[str] | None = None  # differences from the last invocation, one per line


@dataclass(frozen=True)
class ColdStart(Event):
    """Workers are not forked: each imports everything itself."""

    reason: str


@dataclass(frozen=True)
class DataWarnings(Event):
    """The listing of the data has found possible mistakes."""

    warnings: list[str]


@dataclass(frozen=True)
class EntriesExcluded(Event):
    """The listing has excluded files that are not samples."""

    entries: list[dict[str, Any]]  # fields of ftexp.data.info.Excluded


@dataclass(frozen=True)
class RepeatedSamples(Event):
    """A global batch is larger than the training split."""

    reason: str


@dataclass(frozen=True)
class Finished(Event):
    """The run is done."""


@dataclass(frozen=True)
class Failed(Event):
    """The run has failed, and is not restarted."""

    error: str | None = None


@dataclass(frozen=True)
class Interrupted(Event):
    """A user or the system has stopped the run."""


@dataclass(frozen=True)
class DriverFailed(Event):
    """The driver could not handle a message."""

    error: str
    traceback: str


@dataclass(frozen=True)
class ReportFailed(Event):
    """The report could not be written, or lacks something."""

    error: str


@dataclass(frozen=True)
class EvaluationFailed(Event):
    """A checkpoint could not be evaluated while training continued; the run has no metrics of its step."""

    step: int
    error: str


# Worker groups


@dataclass(frozen=True)
class AttemptStarted(Event):
    """Rank 0 of a new worker group has connected."""

    world_size: int
    pid: int
    node: str
    hot_start: bool


@dataclass(frozen=True)
class WorkerReplaced(Event):
    """A worker that replaces a dead one has connected; the others wait for it."""

    rank: int
    pid: int
    node: str
    hot_start: bool


@dataclass(frozen=True)
class WeightsLoaded(Event):
    """Another model's weights were loaded at the start."""

    report: str


@dataclass(frozen=True)
class Ready(Event):
    """A worker group is about to train."""

    device: str
    pids: list[int]  # by rank
    source: str | None = None  # source of the state: replaced, memory, storage or start


@dataclass(frozen=True)
class CaughtUp(Event):
    """All steps lost by a failure have been repeated."""

    step: int
    replayed_from: int


@dataclass(frozen=True)
class Raised(Event):
    """A worker has ended by an exception."""

    rank: int
    traceback: str


@dataclass(frozen=True)
class Failure(Event):
    """A worker group has failed; the fields of `ftexp.rundir.state.Failure` that are known at that time."""

    cause: str
    rank: int | None
    error: str
    seconds_to_detect: float | None
    seconds_to_restart: float | None
    seconds_to_restore: float | None
    steps_replayed: int | None
    node: str | None
    progressed: bool
    decision: str


@dataclass(frozen=True)
class Recovered(Event):
    """The first new step after a failure was done; fields of `ftexp.rundir.state.Failure`."""

    cause: str
    rank: int | None
    recovery: str | None
    seconds_to_detect: float | None
    seconds_to_restart: float | None
    seconds_to_restore: float | None
    seconds_to_new_step: float | None
    steps_replayed: int | None


@dataclass(frozen=True)
class Waiting(Event):
    """There have been no workers for a while."""

    reason: str


@dataclass(frozen=True)
class ResizeExpected(Event):
    """There is room for more workers: Ray Train will stop the running ones, without notice."""

    num_workers: int


@dataclass(frozen=True)
class Resized(Event):
    """A worker group of another size trains, without any failure."""

    world_size: int


@dataclass(frozen=True)
class AdviceFailed(Event):
    """A thread that the run does not depend on has failed."""

    error: str


@dataclass(frozen=True)
class PreemptionNotice(Event):
    """Nodes are about to be preempted."""

    step: int
    nodes: list[str]
    ranks: list[int]
    deadline_ms: int | None  # milliseconds since 1970


# Checkpoints


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is complete."""

    step: int
    checkpoint: str
    bytes: int
    write_s: float
    metrics: dict[str, Any]
    reasons: list[str]
    blocked_s: float  # seconds that it blocked the training


@dataclass(frozen=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written."""

    step: int
    error: str


@dataclass(frozen=True)
class FullModelFailed(Event):
    """A sharded checkpoint is valid, but its model.pt could not be written."""

    step: int  # step of the checkpoint after which it was tried
    checkpoint: str
    error: str


@dataclass(frozen=True)
class CheckpointRejected(Event):
    """A checkpoint doesn't verify, or is missing."""

    checkpoint: str
    reason: str


@dataclass(frozen=True)
class Restored(Event):
    """A worker group resumes from a checkpoint, or from a snapshot in memory."""

    rejected: int  # number of checkpoints rejected before this one
    restore_s: float
    checkpoint: str  # name; for a snapshot, the name that its checkpoint would have
    step: int
    position: int
    source: str = "storage"  # or memory


@dataclass(frozen=True)
class SnapshotsBegun(Event):
    """A worker has reserved memory on its node for snapshots."""

    node: str  # its node id in Ray
    pid: int  # pid of the keeper, which owns the memory
    bytes: int  # memory of the snapshots on the node


@dataclass(frozen=True)
class SnapshotsTaken(Event):
    """Snapshots in memory are being taken; the cost of one of them."""

    every_steps: int  # steps between snapshots
    seconds: float  # time that training waited for it, or processor time that it took from training
    share: float  # share of the time until the next
    bytes: int  # memory of the snapshots on rank 0's node


@dataclass(frozen=True)
class SnapshotsOff(Event):
    """There are no snapshots in memory: after a failure, the run resumes from the last checkpoint."""

    reason: str


@dataclass(frozen=True)
class Swept(Event):
    """The remains of an interrupted checkpoint were removed."""

    folder: str


# Training


@dataclass(frozen=True)
class BadSamples(Event):
    """Samples that can't be read were excluded."""

    count: int
    samples: list[dict[str, Any]]  # fields of ftexp.data.info.BadSample


@dataclass(frozen=True)
class SlowData(Event):
    """A worker has to wait for its data."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Straggler(Event):
    """A rank stays slower than the others, and keeps them waiting: see scaling.straggler_factor."""

    rank: int
    part: str  # part of a step in which it exceeds the others most
    ratio: float  # own_ms as a multiple of median_ms
    own_ms: float  # milliseconds of a step, without waiting for others
    median_ms: float  # median over ranks
    step: int
    node: str | None = None  # filled in by the driver


@dataclass(frozen=True)
class StragglerOver(Event):
    """A straggler is as fast as the others again."""

    rank: int
    step: int
    node: str | None = None  # filled in by the driver


@dataclass(frozen=True)
class NcclHang(Event):
    """Ray's detector has found that ranks of a worker group, now ended, hung in NCCL."""

    files: list[str]  # files of the run directory


@dataclass(frozen=True)
class Thawed(Event):
    """Another part of the model is trained from now on."""

    epoch: int
    num_frozen: int  # number of frozen parameters


@dataclass(frozen=True)
class LearningRateChanged(Event):
    """The schedule's learning rate differs from the checkpoint's: train.epochs was raised."""

    step: int
    before: float
    after: float


@dataclass(frozen=True)
class StepSkipped(Event):
    """A gradient was not finite: its batch drives no update."""

    positions: list[int]  # [start, end)
    step: int
    reason: str


@dataclass(frozen=True)
class RolledBack(Event):
    """A gradient was not finite: the state of the last checkpoint, kept in memory, was restored."""

    positions: list[int]  # [start, end) positions that drive no update
    step: int
    to_step: int


@dataclass(frozen=True)
class CorruptionChecked(Event):
    """A check for silent corruption has passed for the second time in an attempt."""

    check: str  # replicas, or repeat
    every_steps: int
    seconds: float  # duration of the check
    share: float  # share of the time since the first check


@dataclass(frozen=True)
class Chaos(Event):
    """A planned fault is being injected."""

    fault: str
    rank: int
    step: int
    damaged: list[str] | None = None  # names of the checkpoints that it damaged


@dataclass(frozen=True)
class MfuUnknown(Event):
    """The utilisation of the device is unknown."""

    reason: str


@dataclass(frozen=True)
class ProfileWritten(Event):
    """A profiler trace was written to the run directory."""

    where: str


@dataclass(frozen=True)
class ProfileFailed(Event):
    """No profiler trace could be written."""

    error: str


@dataclass(frozen=True)
class StoppedEarly(Event):
    """A hook, or early stopping, has ended the run before its last step."""

    step: int
    epoch: int
    reason: str
    rules: dict[str, Any]  # `stopping` and `hooks` of the config


# Trackers


@dataclass(frozen=True)
class TrackerOpened(Event):
    """A tracker receives the run's points."""

    tracker: str
    where: str


@dataclass(frozen=True)
class TrackerFailed(Event):
    """A tracker is down, or lacks points at the end."""

    tracker: str
    reason: str
    num_undelivered: int  # number of points not delivered


# Alerts


@dataclass(frozen=True)
class AlertSent(Event):
    """An alert was delivered."""

    alert: str  # kind of the alert
    to: str  # scheme and host of the URL


@dataclass(frozen=True)
class AlertFailed(Event):
    """An alert could not be delivered."""

    alert: str
    to: str
    reason: str


EVENTS = {snake_case(event): event for event in Event.__subclasses__()}


def make_event(name: str, fields: dict[str, Any]) -> Event:
    """Return the event called `name`; KeyError or TypeError if there is none with such fields."""
    return EVENTS[name](**fields)
