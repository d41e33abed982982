"""Meeting of the living ranks with the replacement of a dead one.

In each worker's process, the training thread waits here, and Ray Train's controller calls in.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

# time for a rank to notice another's death; if it is still in its step then, `may_wait` assumes that it will wait
_SETTLE_S = 0.05


@dataclass(frozen=True)
class Waiting:
    """A rank whose step was interrupted."""

    step: int  # last step that it has done
    address: tuple[str, int] | None  # address of the store where the ranks meet, if this rank serves it


@dataclass(frozen=True)
class Invitation:
    """Invitation to a meeting."""

    address: tuple[str, int]  # address of the store where the ranks meet
    number: int  # number of the meeting; the store's keys contain it
    rank: int  # rank that was replaced


class Meeting:
    """One process's part in a meeting. A waiting rank waits until it calls `leave`: the replacement may die too."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: Waiting | None = None
        self._invitation: Invitation | None = None
        self.is_noticed = False  # whether the controller knows that it waits, and will restart one rank or all
        self._can_wait = False  # whether the training thread is where it would wait if a rank died

    def expect(self, can_wait: bool) -> None:
        """Note whether the training thread is now in code where it would wait if another rank died."""
        with self._changed:
            self._can_wait = can_wait
            self._changed.notify_all()

    def wait(self, waiting: Waiting) -> None:
        """Note that the training thread waits from now on."""
        with self._changed:
            self._waiting, self._invitation, self.is_noticed = waiting, None, False
            self._changed.notify_all()

    def leave(self) -> None:
        """Note that the training thread continues or ends."""
        with self._changed:
            self._waiting = self._invitation = None
            self._changed.notify_all()

    def waiting(self, timeout_s: float) -> Waiting | None:
        """Return the state of the training thread once it waits; None if it won't, or not in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or not self._can_wait, timeout_s)
            self.is_noticed = self._waiting is not None
            return self._waiting

    def may_wait(self) -> bool:
        """Return whether the training thread waits, or will once its step is interrupted."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or not self._can_wait, _SETTLE_S)
            return self._waiting is not None or self._can_wait

    def invite(self, invitation: Invitation) -> None:
        """Pass an invitation to the training thread."""
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
    """Call `may_wait` of this process; for the controller, before the driver decides."""
    return MEETING.may_wait()


def waiting(timeout_s: float) -> Waiting | None:
    """Call `waiting` of this process; for the controller."""
    return MEETING.waiting(timeout_s)


def invite(invitation: Invitation) -> None:
    """Call `invite` of this process; for the controller."""
    MEETING.invite(invitation)


def common_step(found: list[Waiting | None]) -> int | None:
    """Return the step after which all ranks wait; None if one doesn't wait, or waits after another step."""
    steps = {each.step if each is not None else None for each in found}
    return steps.pop() if len(steps) == 1 else None
