"""Where the ranks that live wait for the one that is started again: within a worker's process, between its training
thread and the calls of Ray Train's controller.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

_SETTLE_S = 0.05  # that a rank may take to notice the death of another, unless its step takes longer


@dataclass(frozen=True)
class Waiting:
    """A rank whose step was interrupted."""

    step: int  # the last that it has done
    address: tuple[str, int] | None  # address of the store in which ranks meet, if this rank serves it


@dataclass(frozen=True)
class Invitation:
    """Where to meet, and as which meeting of the worker group."""

    address: tuple[str, int]
    number: int
    rank: int  # that is started again


class Meeting:
    """One process's part. What is `waiting` stays so until it `leaves`: the rank that comes may die as well."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Waiting | None = None
        self._invitation: Invitation | None = None
        self.is_noticed = False  # by the controller, which starts a rank again or all of them
        self._can_wait = False  # whether the training thread is where it would wait if a rank died

    def expect(self, can_wait: bool) -> None:
        """The training thread enters, or leaves, code in which it waits if another rank dies."""
        with self._changed:
            self._can_wait = can_wait
            self._changed.notify_all()

    def wait(self, waiting: Waiting) -> None:
        """The training thread waits from here on."""
        with self._changed:
            self._waiting, self._invitation, self.is_noticed = waiting, None, False
            self._changed.notify_all()

    def leave(self) -> None:
        """The training thread continues, or ends."""
        with self._changed:
            self._waiting = self._invitation = None
            self._changed.notify_all()

    def waiting(self, timeout_s: float) -> Waiting | None:
        """Return how the training thread waits, once it does; None if it won't, or doesn't in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or not self._can_wait, timeout_s)
            self.is_noticed = self._waiting is not None
            return self._waiting

    def may_wait(self) -> bool:
        """Whether the training thread waits, or is where it will once it comes to the end of its step."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or not self._can_wait, _SETTLE_S)
            return self._waiting is not None or self._can_wait

    def invite(self, invitation: Invitation) -> None:
        """Let the training thread come to a meeting."""
        with self._changed:
            self._invitation = invitation
            self._changed.notify_all()

    def invitation(self, timeout_s: float) -> Invitation | None:
        """Return the latest invitation, once there is one; None if none comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._invitation is not None, timeout_s)
            return self._invitation


MEETING = Meeting()  # one for each process, since Ray's calls and the training thread share no other object


def may_wait() -> bool:
    """Ask a worker's process, from the controller, before anything is decided."""
    return MEETING.may_wait()


def waiting(timeout_s: float) -> Waiting | None:
    """Ask a worker's process, from the controller."""
    return MEETING.waiting(timeout_s)


def invite(invitation: Invitation) -> None:
    """Invite a worker's process, from the controller."""
    MEETING.invite(invitation)


def common_step(found: list[Waiting | None]) -> int | None:
    """Return the step after which all ranks wait; None if one doesn't, or has done another."""
    steps = {each.step if each is not None else None for each in found}
    return steps.pop() if len(steps) == 1 else None
