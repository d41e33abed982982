"""State of the worker group, derived from messages."""

from __future__ import annotations

import time
from enum import Enum, auto

from ftexp.wire import events
from ftexp.wire.messages import Happened, Hello, Lost, Message, Ready


class Start(Enum):
    """Why a worker group starts."""

    FIRST = auto()  # first group of this invocation
    AFTER_FAILURE = auto()
    RESIZED = auto()  # Ray Train stopped the group before, to start more workers or fewer


class WorkerGroup:
    """The worker group that trains, or is awaited."""

    def __init__(self, start: Start) -> None:
        self.start = start  # why the next group starts
        self.restored: events.Restored | None = None
        self.rejected: list[str] = []  # rejected checkpoints
        self.world_size: int | None = None  # None while there is no group
        self._waiting_since: float | None = time.monotonic()  # None while there is a group
        self._waiting_for: str | None = None  # last reason of `is_news`

    def note(self, message: Message) -> None:
        """Update the state from a message."""
        match message:
            case Hello(rank=rank, world_size=world_size, replaces=replaces) if rank == 0 or replaces:
                self.world_size, self.restored, self.rejected = world_size, None, []
                self._waiting_since = self._waiting_for = None
            case Lost():
                self._is_gone()
            case Ready():
                self.start = Start.RESIZED  # the next group's reason, unless this one fails
            case Happened(events.Restored() as restored):
                self.restored = restored
            case Happened(events.CheckpointRejected(checkpoint)):
                self.rejected.append(checkpoint)

    def failed(self) -> None:
        """Note that the group failed, or could not start."""
        self.start = Start.AFTER_FAILURE
        self._is_gone()

    def _is_gone(self) -> None:
        self.world_size, self._waiting_since = None, self._waiting_since or time.monotonic()

    @property
    def waiting_s(self) -> float:
        """Seconds without a worker group; 0 while there is one."""
        return time.monotonic() - self._waiting_since if self._waiting_since is not None else 0.0

    def is_news(self, reason: str) -> bool:
        """Return whether no group trains, and `reason` differs from that of the last call."""
        if self._waiting_since is None or reason == self._waiting_for:
            return False
        self._waiting_for = reason
        return True
