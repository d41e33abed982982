"""Start and end of torch's process group, in Ray Train's controller; the driver decides about a failed start.

Ray picks a free port, which another process may take before torch listens on it. Ray Train itself would then end the
run. Or a worker dies meanwhile. Ray Train would then start workers for which there is no room, since it forgets the
placement group of the earlier ones.

At the end, Ray would destroy the process group in workers that still train after another's death. Here they keep it.
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
    """Ray's backend, with reports of a failed start, and without an end of the process group before the workers'."""

    def on_start(self, worker_group: Any, backend_config: ReportingTorchConfig) -> None:
        """Start the process group; Ray's hook.

        After a failure, StopRun if the run ends; otherwise RayActorError, after which Ray starts new workers.
        """
        if is_replacement(worker_group):  # the ranks form the new group themselves
            set_environment(worker_group)
            return
        placement_group = None
        try:
            placement_group = _placement_group(worker_group)
            super().on_start(worker_group, backend_config)
        except (RayTaskError, RayActorError) as error:
            if placement_group is not None:
                remove_placement_group(placement_group)  # ends the workers too, which wait for the failed one
            cause = find_cause({0: error.cause if isinstance(error, RayTaskError) else error})
            backend_config.reporter.report(dataclasses.replace(cause, rank=None))  # Ray doesn't say which rank failed
            raise RayActorError(error_msg=cause.error) from error

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Leave the process group as it is; Ray's hook, called before it kills the workers.

        Without a group, a rank that still trains would take itself for the only one: it would log its own part of an
        evaluation as the result.
        """


def _placement_group(worker_group: Any) -> Any:
    """Return the placement group of the workers, from the first that lives; RayActorError if none does."""
    for rank in range(len(worker_group)):
        with contextlib.suppress(RayActorError):
            return worker_group.execute_single(rank, get_current_placement_group)
    raise RayActorError(error_msg="all workers died while they started")


@dataclass(kw_only=True)
class ReportingTorchConfig(TorchConfig):  # type: ignore[misc]
    """TorchConfig that reports a failed start of the process group to the driver, by `reporter`."""

    reporter: FailureReporter

    @property
    def backend_cls(self) -> type[ReportingBackend]:
        """Ray's hook: the class of the backend."""
        return ReportingBackend
