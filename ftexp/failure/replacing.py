"""Replacement of a single worker, in Ray Train's controller."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ftexp.cluster.ray_replacing import ReplacingController
from ftexp.failure.meeting import Invitation, Waiting, common_step, invite, may_wait, waiting
from ftexp.failure.reporter import FailureReporter

WAIT_S = 30.0  # time limit for another worker to end its interrupted step and wait


class TrainController(ReplacingController):  # Ray names the process after the class
    """Controller that replaces a worker if the driver decides so, once all others wait after the same step."""

    _numbers = itertools.count(1)

    def others(self, can: Callable[[Callable[[], bool]], bool]) -> None:
        """Note for the report whether the other workers can wait."""
        FailureReporter.others_wait = can(may_wait)

    def may_replace(self) -> bool:
        """Return whether the driver's last decision was to replace the worker."""
        return FailureReporter.replaces

    def question(self, timeout_s: float) -> tuple[Callable[[float], Waiting | None], float]:
        """Return the function that asks a worker whether it waits, and its time limit."""
        return waiting, min(timeout_s, WAIT_S)

    def invitation(
        self, rank: int, answers: list[Waiting | None]
    ) -> tuple[Callable[[Invitation], None], Invitation] | None:
        """Return the invitation to the store that rank 0 serves; None unless the others wait after the same step."""
        address = next((each.address for each in answers if each is not None and each.address is not None), None)
        if common_step(answers) is None or address is None:
            return None
        return invite, Invitation(address, next(self._numbers), rank)
