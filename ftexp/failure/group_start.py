"""The start of torch's process group, in Ray Train's controller: what fails there is decided upon as any failure is.

Ray picks a free port, which another process may take before torch listens on it; or a worker dies meanwhile. Ray Train
would end the run by the first, and after the second start workers for which there is no room: it forgets the placement
group of those that it had.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.train.torch import TorchConfig
from ray.util.placement_group import get_current_placement_group, remove_placement_group

from ftexp.cluster.ray_replacing import is_replacement, set_environment
from ftexp.failure.causes import find_cause
from ftexp.failure.reporter import FailureReporter


class ReportingBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's own, with failures of the start reported."""

    def on_start(self, worker_group: Any, backend_config: ReportingTorchConfig) -> None:
        """Ray's hook. StopRun if there shall be no further try, else RayActorError: Ray then makes new workers."""
        if is_replacement(worker_group):  # the ranks form their group themselves
            set_environment(worker_group)
            return
        placement_group = None
        try:
            placement_group = _placement_group(worker_group)
            super().on_start(worker_group, backend_config)
        except (RayTaskError, RayActorError) as error:
            if placement_group is not None:
                remove_placement_group(placement_group)  # and with it the workers, which wait for the one that failed
            cause = find_cause({0: error.cause if isinstance(error, RayTaskError) else error})
            backend_config.reporter.report(dataclasses.replace(cause, rank=None))  # Ray doesn't say which it was
            raise RayActorError(error_msg=cause.error) from error


def _placement_group(worker_group: Any) -> Any:
    """Return the one of a group of workers, by asking one that lives; RayActorError if none does."""
    for rank in range(len(worker_group)):
        with contextlib.suppress(RayActorError):
            return worker_group.execute_single(rank, get_current_placement_group)
    raise RayActorError(error_msg="all workers died while they started")


@dataclass(kw_only=True)
class ReportingTorchConfig(TorchConfig):  # type: ignore[misc]
    """A TorchConfig whose process group may fail to start: `reporter` passes that to the driver."""

    reporter: FailureReporter

    @property
    def backend_cls(self) -> type[ReportingBackend]:
        """Ray's hook."""
        return ReportingBackend
