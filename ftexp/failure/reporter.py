"""Hook in Ray Train's controller that reports every failure to the driver and carries out its decision."""

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
    """Exception that ends the run in Ray Train's controller; Ray retries after any other."""


class FailureReporter(UserCallback):  # type: ignore[misc]
    """Reports every failure to the driver, and ends the run if the driver decides so."""

    # class attributes, shared with TrainController; each controller has its own process
    replaces: ClassVar[bool] = False  # whether the driver's last decision was to replace a worker
    others_wait: ClassVar[bool] = False  # whether one worker failed, and the others can wait until it is replaced

    def __init__(self, hub: HubAddress) -> None:
        self._hub = hub

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Report that workers raised an exception or died; Ray's hook. StopRun if the run ends."""
        self.report(find_cause(worker_exceptions), self.others_wait)

    def report(self, cause: Cause, others_wait: bool = False) -> None:
        """Report a failure to the driver, and wait for the delay that it decides. StopRun if the run ends."""
        failed = GroupFailed(cause.kind, cause.rank, cause.error, cause.ending, others_wait)
        try:
            channel = Channel(self._hub, failed)
        except FtexpError as error:  # without a decision Ray would retry for ever
            raise StopRun(f"no decision from the driver: {error}") from error
        channel.close()
        match channel.answer:
            case Retry(delay_s, replaces):
                FailureReporter.replaces = replaces
                time.sleep(delay_s)  # Ray starts the next group when this returns
            case Stop(reason):
                raise StopRun(reason)
            case _:
                raise StopRun("no decision from the driver")
