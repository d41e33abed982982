"""Access of a run's processes to the keepers, which are Ray actors named by their node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftexp.checkpoint.memory.keeper import Keeper, KeeperLostError

_PREFIX = "ftexp-snapshots-"
_NICE = 5  # a keeper works while training continues


class RayLinks:
    """Reaches the keepers of the job that this process belongs to."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}

    @property
    def node(self) -> str:
        """Ray's id of this node."""
        return str(ray.get_runtime_context().get_node_id())

    def nodes(self) -> list[str]:
        """Return the nodes whose keepers Ray knows."""
        return [name.removeprefix(_PREFIX) for name in ray.util.list_named_actors() if name.startswith(_PREFIX)]

    def call(self, node: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a keeper's method; KeeperLostError if there is no answer in time."""
        try:
            if node not in self._actors:
                self._actors[node] = ray.get_actor(f"{_PREFIX}{node}")
            return ray.get(getattr(self._actors[node], method).remote(*arguments), timeout=timeout_s)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            self._actors.pop(node, None)
            raise KeeperLostError(f"no answer from the keeper of node {node}: {type(error).__name__}") from error


class _RayKeeper(Keeper):
    def __init__(self, max_bytes: int | None) -> None:
        os.nice(_NICE)
        super().__init__(RayLinks(), max_bytes)


def start_keepers(nodes: Sequence[str], max_bytes: int | None, runtime_env: dict[str, Any]) -> list[Any]:
    """Start a keeper on each of these nodes; returns their handles. They exit with this process's job."""
    made = ray.remote(_RayKeeper)
    return [
        made.options(
            name=f"{_PREFIX}{node}",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=4,  # a keeper that copies from a node must serve that node's reads meanwhile
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env=runtime_env or None,
        ).remote(max_bytes)
        for node in nodes
    ]
