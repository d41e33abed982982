"""The replacement of a single worker, in Ray Train's controller."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ftexp.cluster.ray_replacing import ReplacingController
from ftexp.failure.meeting import Invitation, Waiting, common_step, invite, may_wait, waiting
from ftexp.failure.reporter import FailureReporter

WAIT_S = 30.0  # that a step may take which is interrupted


class TrainController(ReplacingController):  # its name is that of its process
    """Replaces a worker where the driver says so, once all others wait after the same step."""

    _numbers = itertools.count(1)

    def others(self, can: Callable[[Callable[[], bool]], bool]) -> None:
        """Note for the report whether they can wait."""
        FailureReporter.others_wait = can(may_wait)

    def may_replace(self) -> bool:
        """Whether the driver's last answer was so."""
        return FailureReporter.replaces

    def question(self, timeout_s: float) -> tuple[Callable[[float], Waiting | None], float]:
        """Ask how each worker waits."""
        return waiting, min(timeout_s, WAIT_S)

    def invitation(
        self, rank: int, answers: list[Waiting | None]
    ) -> tuple[Callable[[Invitation], None], Invitation] | None:
        """Have all meet in the store that rank 0 serves, if the others wait after the same step."""
        address = next((each.address for each in answers if each is not None and each.address is not None), None)
        if common_step(answers) is None or address is None:
            return None
        return invite, Invitation(address, next(self._numbers), rank)
