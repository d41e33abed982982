"""Where the workers stand, from what is heard of them."""

from __future__ import annotations

import time
from enum import Enum, auto

from ftexp.wire import events
from ftexp.wire.messages import Happened, Hello, Lost, Message, Ready


class Start(Enum):
    """Why a worker group starts."""

    FIRST = auto()  # first group of this invocation
    AFTER_FAILURE = auto()
    RESIZED = auto()  # Ray Train stopped the one before, to start more workers or fewer


class WorkerGroup:
    """The workers that train, or will."""

    def __init__(self, start: Start) -> None:
        self.start = start  # start of the group that trains next
        self.restored: events.Restored | None = None
        self.rejected: list[str] = []  # checkpoints
        self.world_size: int | None = None  # None while there is none
        self._waiting_since: float | None = time.monotonic()  # likewise
        self._waiting_for: str | None = None

    def note(self, message: Message) -> None:
        """Take in what a message says of it."""
        match message:
            case Hello(rank=rank, world_size=world_size, replaces=replaces) if rank == 0 or replaces:
                self.world_size, self.restored, self.rejected = world_size, None, []
                self._waiting_since = self._waiting_for = None
            case Lost():
                self._is_gone()
            case Ready():
                self.start = Start.RESIZED  # whatever comes next without a failure
            case Happened(events.Restored() as restored):
                self.restored = restored
            case Happened(events.CheckpointRejected(checkpoint)):
                self.rejected.append(checkpoint)

    def failed(self) -> None:
        """Handle a worker group that failed, or could not start."""
        self.start = Start.AFTER_FAILURE
        self._is_gone()

    def _is_gone(self) -> None:
        self.world_size, self._waiting_since = None, self._waiting_since or time.monotonic()

    @property
    def waiting_s(self) -> float:
        """For how long there has been none, in seconds."""
        return time.monotonic() - self._waiting_since if self._waiting_since is not None else 0.0

    def is_news(self, reason: str) -> bool:
        """Whether it waits for another `reason` than when this was last asked."""
        if self._waiting_since is None or reason == self._waiting_for:
            return False
        self._waiting_for = reason
        return True
