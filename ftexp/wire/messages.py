"""Messages between processes: a class for each kind, and conversion to and from a line of JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from ftexp.wire.events import Event, make_event, snake_case


@dataclass(frozen=True)
class Message:
    """A message from one process to another."""

    time: float = field(default_factory=time.time, kw_only=True, compare=False)  # of the event, in seconds since 1970


# source of an attempt's initial state: surviving ranks, snapshots in memory, a checkpoint, or none
REPLACED, MEMORY, STORAGE, START = "replaced", "memory", "storage", "start"
UNSAVED, DAMAGED, FAILED = "unsaved", "damaged", "failed"  # the checkpoint can't be evaluated; the evaluation raised

# From a worker to the driver


@dataclass(frozen=True)
class Hello(Message):
    """A worker has started; answered by `Begin` for rank 0 and for a replacement, or by `Stop`."""

    rank: int
    world_size: int
    pid: int
    node: str
    hot_start: bool = False  # whether it was forked from a process that had imported everything
    ray_node: str = ""  # node id in Ray
    replaces: bool = False  # whether it replaces a dead worker, while the others live


@dataclass(frozen=True)
class Ready(Message):
    """Rank 0 is about to train, or to continue after another rank was replaced."""

    step: int
    total_steps: int
    device: str
    arguments: dict[str, Any]  # arguments of timm.create_model
    num_parameters: int
    hardware: dict[str, Any] = field(default_factory=dict)  # hardware of its node
    weights: str | None = None  # report on the weights that were loaded into the model
    source: str = START  # source of the state: REPLACED, MEMORY, STORAGE or START


@dataclass(frozen=True)
class Tick(Message):
    """Rank 0 has done a step."""

    step: int
    epoch: int


@dataclass(frozen=True)
class Metrics(Message):
    """A logged point."""

    split: str
    step: int
    epoch: int
    values: dict[str, float]


@dataclass(frozen=True)
class EvaluateCheckpoint(Message):
    """Rank 0 requests the evaluation of a checkpoint on val; answered by `Evaluated` when it is done."""

    step: int
    epoch: int
    checkpoint: str


@dataclass(frozen=True)
class Happened(Message):
    """An event, for the run's records."""

    event: Event


@dataclass(frozen=True)
class Raised(Message):
    """A worker is ending by an exception."""

    rank: int
    step: int
    position: int
    samples: list[int]  # samples of its current batch
    traceback: str


@dataclass(frozen=True)
class Hung(Message):
    """A worker has made no progress, and is about to kill itself."""

    rank: int
    doing: str  # the phase of its loop
    seconds: float
    file: str  # file that has the stacks of its threads


@dataclass(frozen=True)
class ForgetSnapshots(Message):
    """No attempt may resume from the snapshots that are in memory now."""


@dataclass(frozen=True)
class KillDriver(Message):
    """Chaos: kills the driver."""


@dataclass(frozen=True)
class Sync(Message):
    """Asks whether all earlier messages have been recorded; answered by `Synced`."""

    number: int


@dataclass(frozen=True)
class Goodbye(Message):
    """The sender's last message; its process may end."""


# From Ray's controller to the driver, and from threads of the driver


@dataclass(frozen=True)
class GroupFailed(Message):
    """A worker group has failed: the fields of `ftexp.failure.causes.Cause`. Answered by `Retry` or `Stop`."""

    cause: str
    rank: int | None
    error: str
    ending: str
    others_wait: bool = False  # whether the others can wait for the failed worker's replacement


@dataclass(frozen=True)
class ControllerDied(Message):
    """Ray Train's controller has died, and its workers with it; answered like `GroupFailed`."""


@dataclass(frozen=True)
class CouldNotStart(Message):
    """Ray Train has given up before any worker group started to train."""

    error: str


@dataclass(frozen=True)
class Lost(Message):
    """The hub's own message: a worker's connection has closed without a goodbye."""

    rank: int
    pid: int


# From the driver


@dataclass(frozen=True)
class Begin(Message):
    """Facts of the run for rank 0."""

    attempt: int
    skipped: list[list[int]] = field(default_factory=list)  # [start, end) positions that drive no update
    accumulate_steps: int | None = None  # set if it is more than configured
    # [attempt, step]: the run descends from this attempt's states in memory up to this step; None: from all of them
    lineage: list[list[int | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Retry(Message):
    """Another attempt follows."""

    delay_s: float
    replaces: bool = False  # restart only the failed worker, if the others are at a point where they can wait for it


@dataclass(frozen=True)
class Stop(Message):
    """Asks the run to end; workers that train save a checkpoint first."""

    reason: str = "the run was asked to stop"


@dataclass(frozen=True)
class Save(Message):
    """Asks workers to save a checkpoint soon."""


@dataclass(frozen=True)
class Evaluated(Message):
    """The answer to `EvaluateCheckpoint`, sent to every worker."""

    step: int
    epoch: int
    checkpoint: str
    values: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # why there are no values: UNSAVED, DAMAGED or FAILED
    problem: str = ""  # the same, as a message


@dataclass(frozen=True)
class Synced(Message):
    """Everything up to the `Sync` of that number has been handled."""

    number: int
    problem: str | None = None  # why it could not be written


_MESSAGES = {snake_case(message): message for message in Message.__subclasses__()}


def to_line(message: Message | None) -> str:
    """Return `message` as a line of JSON, including the newline."""
    content = message and {"kind": snake_case(type(message)), **vars(message)}
    return json.dumps(content, default=lambda event: [event.name, vars(event)]) + "\n"


def from_line(line: str) -> Message | None:
    """Return the message in a line; None if the line holds none, for example because a kill truncated it."""
    try:
        content = json.loads(line)
        kind = _MESSAGES[content.pop("kind")]
        if kind is Happened:
            content["event"] = make_event(*content["event"])
        message: Message = kind(**content)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return message
