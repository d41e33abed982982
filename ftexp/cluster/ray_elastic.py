"""Number of workers that there is room for, as Ray Train asks before it starts a worker group.

Uses private names of Ray; `tests/unit/test_ray_private.py` fails when an upgrade moves one.

The actor that counts the nodes does so every 20 s. Asked just after a node's death, it still counts that node, and Ray
Train waits for a group that can't start.

A placement group that is requested before Ray knows that the previous group's resources are free waits until Ray looks
at pending requests again, once a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import elastic
from ray.train.v2._internal.execution.scaling_policy.factory import create_scaling_policy

if TYPE_CHECKING:
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ReservedResources
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
    from ray.train.v2._internal.execution.worker_group import WorkerGroupContext

_ROOM_S = 1.0  # by then, Ray would have looked at the pending placement group again
_POLL_S = 0.01


class FreshElasticScalingPolicy(elastic.ElasticScalingPolicy):  # type: ignore[misc]
    """Elastic policy that counts the nodes that are alive at the time of the call."""

    _latest_reserved_resources_query_time: float

    def _get_reserved_resources(self) -> ReservedResources | None:
        asked_s_ago = elastic.time_monotonic() - self._latest_reserved_resources_query_time
        if asked_s_ago >= self.GET_RESERVED_RESOURCES_INTERVAL_S:
            # the result is not needed: Ray's code below asks again, and reports errors
            self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        return super()._get_reserved_resources()


def scaling_policy(config: ScalingConfig) -> ScalingPolicy:
    """Return the policy that Ray Train would create, with the class above in place of its elastic one."""
    return FreshElasticScalingPolicy(config) if config.elasticity_enabled else create_scaling_policy(config)


class RoomAwaited(WorkerGroupCallback):  # type: ignore[misc]
    """Callback that delays the start of a worker group until Ray reports room for it, for at most a second."""

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Wait for room; Ray Train calls this hook in the controller."""
        wanted, count = worker_group_context.resources_per_worker, worker_group_context.num_workers
        deadline = time.monotonic() + _ROOM_S
        while time.monotonic() < deadline:
            available = ray.available_resources()
            if all(available.get(name, 0) >= amount * count for name, amount in wanted.items()):
                return
            time.sleep(_POLL_S)
