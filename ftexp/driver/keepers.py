"""Keepers of snapshots: a process on each node with workers, started once these train, so that nothing waits for it.

The driver owns the keepers: they survive the failure of a worker group, and end with the invocation.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import ray.exceptions

from ftexp.checkpoint.memory.links import start_keepers
from ftexp.wire import events
from ftexp.wire.messages import Happened, Hello, Message, Ready

if TYPE_CHECKING:
    from ftexp.cluster.resources import Workers
    from ftexp.config.schema import FailureConfig
    from ftexp.wire.hub import Hub

_CLOSE_S = 5.0  # how long the end of a run waits for keepers that are being started
_AFTER_S = 1.0  # delay after training starts: a run that ends sooner needs no keepers


class Keepers:
    """Starts the keepers of one invocation: one per node with workers, and only once, since Ray restarts dead ones."""

    def __init__(self, config: FailureConfig, workers: Workers, hub: Hub) -> None:
        self._config, self._workers, self._hub = config, workers, hub
        self._nodes: dict[int, str] = {}  # Ray's id of each rank's node, in the current group
        self._started: dict[str, Any] = {}  # keepers by node; None until one has started
        self._closed = threading.Event()
        self._lock = threading.Lock()  # held while keepers are started

    def note(self, message: Message) -> None:
        """Note the workers' nodes; once they train, start missing keepers on a thread. Return at once."""
        match message:
            case Hello(rank, ray_node=node):
                self._nodes[rank] = node
            case Ready() if self._config.takes_snapshots:
                nodes = {node for node in self._nodes.values() if node} - set(self._started)
                self._started |= dict.fromkeys(nodes)
                if nodes:
                    threading.Thread(target=self._start, args=(sorted(nodes),), daemon=True, name="keepers").start()

    def close(self) -> None:
        """Start no more keepers: once this Ray was left, a call would start another one."""
        self._closed.set()
        if self._lock.acquire(timeout=_CLOSE_S):
            self._lock.release()

    def _start(self, nodes: list[str]) -> None:
        if self._closed.wait(_AFTER_S if self._config.memory_every_steps is None else 0.0):
            return
        max_gb = self._config.memory_max_gb
        max_bytes = int(max_gb * 1e9) if max_gb is not None else None
        try:
            with self._lock:
                if self._closed.is_set():
                    return
                handles = start_keepers(nodes, max_bytes, dict(self._workers.runtime_env))
        except (ray.exceptions.RayError, ValueError, OSError) as error:
            self._hub.take(Happened(events.SnapshotsOff(f"{type(error).__name__}: {error}")))
            return
        self._started |= dict(zip(nodes, handles, strict=True))  # an actor without a handle ends
