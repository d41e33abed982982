"""The hook in Ray Train's controller: it passes every failure to the driver, and obeys the driver's decision."""

from __future__ import annotations

import time
from typing import ClassVar

from ray.train import UserCallback

from ftexp.errors import FtexpError
from ftexp.failure.causes import Cause, find_cause
from ftexp.wire.channel import Channel
from ftexp.wire.hub import HubAddress
from ftexp.wire.messages import GroupFailed, Retry, Stop


class StopRun(Exception):
    """Raised in Ray Train's controller to end the run; Ray retries everything but this."""


class FailureReporter(UserCallback):  # type: ignore[misc]
    """Reports every failure to the driver, and ends the run if the driver says so."""

    # the controller has a process of its own
    replaces: ClassVar[bool] = False  # what the driver last decided
    others_wait: ClassVar[bool] = False  # whether one worker failed, and the others can wait until it is replaced

    def __init__(self, hub: HubAddress) -> None:
        self._hub = hub

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Ray's hook: one or more workers raised, or died. StopRun if there shall be no further try."""
        self.report(find_cause(worker_exceptions), self.others_wait)

    def report(self, cause: Cause, others_wait: bool = False) -> None:
        """Pass a failure to the driver, and wait as long as it says. StopRun if there shall be no further try."""
        failed = GroupFailed(cause.kind, cause.rank, cause.error, cause.ending, others_wait)
        try:
            channel = Channel(self._hub, failed)
        except FtexpError as error:  # without a decision Ray would retry for ever
            raise StopRun(f"no decision from the driver: {error}") from error
        channel.close()
        match channel.answer:
            case Retry(delay_s, replaces):
                FailureReporter.replaces = replaces
                time.sleep(delay_s)  # Ray makes the next group when this returns
            case Stop(reason):
                raise StopRun(reason)
            case _:
                raise StopRun("no decision from the driver")
