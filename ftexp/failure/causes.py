"""What made a worker group fail, from what Ray hands over."""

from __future__ import annotations

from dataclasses import dataclass

import ray.exceptions
from ray.train import UserCallback

from ftexp import ray_private
from ftexp.errors import FtexpError
from ftexp.wire import HubAddress, Line

BUG, CRASH, OUT_OF_MEMORY = "bug", "crash", "out_of_memory"


@dataclass(frozen=True)
class Cause:
    """Why a worker group failed: what kind of failure, the rank that began it, and its error in a line."""

    kind: str
    rank: int | None
    error: str


def find_cause(worker_exceptions: dict[int, Exception]) -> Cause:
    """Tell the failure that began it from those that followed: a dead rank makes the others' collectives fail.

    Out of memory first, then a process that died, then an exception that is no broken connection.
    """
    ranked = sorted(
        (
            (_kind(error), _is_collateral(error), rank, error)
            for rank, error in ((rank, ray_private.unwrap(error)) for rank, error in worker_exceptions.items())
        ),
        key=lambda item: (item[1], (OUT_OF_MEMORY, CRASH, BUG).index(item[0]), item[2]),
    )
    if not ranked:
        return Cause(CRASH, None, "the worker group was lost")
    kind, collateral, rank, error = ranked[0]
    if collateral:
        return Cause(CRASH, None, "the connection to another worker was lost")
    return Cause(kind, rank, _in_a_line(kind, error))


def _kind(error: Exception) -> str:
    if isinstance(error, (ray.exceptions.OutOfMemoryError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY
    if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)):
        return CRASH
    return BUG


def _is_collateral(error: Exception) -> bool:
    """Whether this looks like the echo of another rank's death: gloo and NCCL raise RuntimeErrors of these words."""
    words = ("Connection reset", "Connection closed", "Broken pipe", "NCCL", "gloo", "Gloo", "process group")
    return _kind(error) == BUG and any(word in str(error) for word in words)


def _in_a_line(kind: str, error: Exception) -> str:
    if kind == CRASH:
        return "the process died (killed, or crashed below Python)"
    if isinstance(error, FtexpError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


class FailureReporter(UserCallback):  # type: ignore[misc]
    """Tells the driver of every failure. Runs in Ray Train's controller; an exception here would end the run."""

    def __init__(self, hub: HubAddress) -> None:
        self._hub = hub

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Ray's hook: one or more workers raised, or died."""
        cause = find_cause(worker_exceptions)
        try:
            line = Line(self._hub, {"kind": "controller"})
        except FtexpError:  # the driver is gone; there is nobody to tell
            return
        line.send("failure", cause=cause.kind, rank=cause.rank, error=cause.error)
        line.close()
