"""Keepers of snapshots, a process on each node with workers: started once these train, so that nothing waits for them.

The driver owns them, so that a worker group that fails takes none of them along, and that they end with the command.
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

_CLOSE_S = 5.0  # that the end of a run may wait for a start
_AFTER_S = 1.0  # seconds of training: a run that is over by then needs none


class Keepers:
    """Starts the keepers of one invocation, on each node where workers are; once, since Ray starts them again."""

    def __init__(self, config: FailureConfig, workers: Workers, hub: Hub) -> None:
        self._config, self._workers, self._hub = config, workers, hub
        self._nodes: dict[int, str] = {}  # node of each rank in the current group
        self._started: dict[str, Any] = {}  # by node
        self._closed = threading.Event()
        self._lock = threading.Lock()  # held while keepers are started

    def note(self, message: Message) -> None:
        """Take in where workers are; start what is missing once they train. Returns at once."""
        match message:
            case Hello(rank, ray_node=node):
                self._nodes[rank] = node
            case Ready() if self._config.takes_snapshots:
                nodes = {node for node in self._nodes.values() if node} - set(self._started)
                self._started |= dict.fromkeys(nodes)
                if nodes:
                    threading.Thread(target=self._start, args=(sorted(nodes),), daemon=True, name="keepers").start()

    def close(self) -> None:
        """Start no more: a call would start another Ray for them, once this one has been left."""
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
