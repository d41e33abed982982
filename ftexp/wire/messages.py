"""Messages between processes: one class for each kind, and its form as a line of JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from ftexp.wire.events import Event, make_event, snake_case


@dataclass(frozen=True)
class Message:
    """Something that one process sends to another."""

    time: float = field(default_factory=time.time, kw_only=True, compare=False)  # when it was; seconds since 1970


# source of the state that an attempt starts from: ranks that survived, snapshots in memory, a checkpoint, or none
REPLACED, MEMORY, STORAGE, START = "replaced", "memory", "storage", "start"
UNSAVED, DAMAGED, FAILED = "unsaved", "damaged", "failed"  # checkpoints that can't be evaluated; evaluation that raised

# From a worker to the driver


@dataclass(frozen=True)
class Hello(Message):
    """A worker has started; answered by `Begin`, for rank 0 and for one that replaces another, or `Stop`."""

    rank: int
    world_size: int
    pid: int
    node: str
    hot_start: bool = False  # it was forked from a process that had imported everything
    ray_node: str = ""  # node id in Ray
    replaces: bool = False  # it takes the place of a worker that died, among others that live


@dataclass(frozen=True)
class Ready(Message):
    """Rank 0 is about to train, or to train on after another rank was replaced."""

    step: int
    total_steps: int
    device: str
    arguments: dict[str, Any]  # arguments of timm.create_model
    num_parameters: int
    hardware: dict[str, Any] = field(default_factory=dict)  # hardware of its node
    weights: str | None = None  # report of what was loaded into the model
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
    """Rank 0 wants a checkpoint evaluated on val; `Evaluated` comes once that is done."""

    step: int
    epoch: int
    checkpoint: str


@dataclass(frozen=True)
class Happened(Message):
    """An event, for the run's records."""

    event: Event


@dataclass(frozen=True)
class Raised(Message):
    """A worker ends by an exception."""

    rank: int
    step: int
    position: int
    samples: list[int]  # that it trained on
    traceback: str


@dataclass(frozen=True)
class Hung(Message):
    """A worker made no progress, and is about to kill itself."""

    rank: int
    doing: str  # the phase of its loop
    seconds: float
    file: str  # with the stacks of its threads


@dataclass(frozen=True)
class ForgetSnapshots(Message):
    """No attempt shall resume from what is in memory now."""


@dataclass(frozen=True)
class KillDriver(Message):
    """Chaos: the driver shall die."""


@dataclass(frozen=True)
class Sync(Message):
    """Is what came before safe? Answered by `Synced`."""

    number: int


@dataclass(frozen=True)
class Goodbye(Message):
    """Nothing follows, and the process may end."""


# From Ray's controller to the driver, and from threads of the driver


@dataclass(frozen=True)
class GroupFailed(Message):
    """A worker group failed: the fields of `ftexp.failure.causes.Cause`. Answered by `Retry` or `Stop`."""

    cause: str
    rank: int | None
    error: str
    ending: str
    others_wait: bool = False  # for the worker that failed, or will


@dataclass(frozen=True)
class ControllerDied(Message):
    """Ray Train's controller died, and its workers with it; answered as `GroupFailed`."""


@dataclass(frozen=True)
class CouldNotStart(Message):
    """Ray Train gave up before any worker group began to train."""

    error: str


@dataclass(frozen=True)
class Lost(Message):
    """The hub's own: the connection of a worker closed without a goodbye."""

    rank: int
    pid: int


# From the driver


@dataclass(frozen=True)
class Begin(Message):
    """Facts of the run for rank 0."""

    attempt: int
    skipped: list[list[int]] = field(default_factory=list)  # [start, end) positions that drive no update
    accumulate_steps: int | None = None  # if more than configured
    # attempts of whose states in memory the run descends, each with the last such step; None: any
    lineage: list[list[int | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Retry(Message):
    """There is another attempt."""

    delay_s: float
    replaces: bool = False  # by starting the failed worker again, if the others are where they can wait for it


@dataclass(frozen=True)
class Stop(Message):
    """The run shall end; workers that train save first."""

    reason: str = "the run was asked to stop"


@dataclass(frozen=True)
class Save(Message):
    """Workers shall save soon."""


@dataclass(frozen=True)
class Evaluated(Message):
    """The answer to `EvaluateCheckpoint`, sent to every worker."""

    step: int
    epoch: int
    checkpoint: str
    values: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # why there are none: UNSAVED, DAMAGED or FAILED
    problem: str = ""  # the same in words


@dataclass(frozen=True)
class Synced(Message):
    """Everything up to the `Sync` of that number was handled."""

    number: int
    problem: str | None = None  # why it isn't safe


_MESSAGES = {snake_case(message): message for message in Message.__subclasses__()}


def to_line(message: Message | None) -> str:
    """Return `message` as a line of JSON, with its end."""
    content = message and {"kind": snake_case(type(message)), **vars(message)}
    return json.dumps(content, default=lambda event: [event.name, vars(event)]) + "\n"


def from_line(line: str) -> Message | None:
    """Return the message in a line; None if it holds none: a kill may cut it short."""
    try:
        content = json.loads(line)
        kind = _MESSAGES[content.pop("kind")]
        if kind is Happened:
            content["event"] = make_event(*content["event"])
        message: Message = kind(**content)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return message
