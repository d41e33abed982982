"""The replacement of a single worker, in Ray Train's controller."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ftexp.cluster.ray_replacing import ReplacingController
from ftexp.failure.meeting import Invitation, common_step, invite, waiting
from ftexp.failure.reporter import FailureReporter

WAIT_S = 30.0  # that a step may take which is interrupted


class TrainController(ReplacingController):  # its name is that of its process
    """Replaces a worker where the driver says so, once all others wait after the same step."""

    _numbers = itertools.count(1)

    def may_replace(self) -> bool:
        """Whether the driver's last answer was so."""
        return FailureReporter.replaces

    def bring_together(self, ask: Callable[..., list[Any]], tell: Callable[..., None], rank: int) -> bool:
        """Let the others, and who was started again, meet where rank 0 serves a store."""
        found = ask(waiting, WAIT_S)
        if common_step(found) is None:
            return False
        address = next((each.address for each in found if each.address is not None), None)
        if address is None:
            return False
        tell(invite, Invitation(address, next(self._numbers), rank))
        return True
