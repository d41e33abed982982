"""Optional threads of the driver: the run continues if one fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ftexp.cluster.hot_start.driver import warm_node
from ftexp.cluster.resources import lacking_resources, living_nodes, num_possible
from ftexp.driver.context import RunContext
from ftexp.driver.worker_group import WorkerGroup
from ftexp.wire import events
from ftexp.wire.hub import Hub
from ftexp.wire.messages import Happened, Save

_LOOK_EVERY_S = 1.0
_WAITING_S = 20.0  # time without workers before it is reported
_SAVE_EVERY_S = 5.0  # interval of checkpoints while Ray Train is about to resize the group
_RESIZE_TAKES_S = 30.0  # time limit of a resize beyond Ray Train's interval; later, other jobs took the room


class Advice:
    """Reports why no workers start, and requests checkpoints before Ray Train starts more. Starts at once."""

    def __init__(self, context: RunContext, group: WorkerGroup, hub: Hub) -> None:
        self._workers, self._scaling = context.workers, context.config.scaling
        self._group, self._hub = group, hub
        self._done = threading.Event()
        self._begin(self._report_waiting)
        if self._workers.min_workers < self._workers.max_workers:
            self._begin(self._save_before_a_resize)

    def stop(self) -> None:
        """Stop the threads."""
        self._done.set()

    def _begin(self, advise: Callable[[], None]) -> None:
        """Run `advise` on a thread. An exception is recorded, and ends only this thread."""

        def run() -> None:
            try:
                advise()
            except Exception as error:
                self._note(events.AdviceFailed(f"{advise.__name__}: {type(error).__name__}: {error}"))

        threading.Thread(target=run, daemon=True, name=advise.__name__).start()

    def _note(self, event: events.Event) -> None:
        self._hub.handle(Happened(event))

    def _report_waiting(self) -> None:
        """Report why no workers start: Ray itself retries silently and without a limit."""
        while not self._done.wait(_LOOK_EVERY_S):
            if self._group.waiting_s > _WAITING_S:
                unknown = "what they need is there, but taken by others, or they don't start"
                self._note(events.Waiting(lacking_resources(self._workers) or unknown))

    def _save_before_a_resize(self) -> None:
        """Request checkpoints before Ray Train stops the workers, which it does once there is room for more.

        Ray Train checks for room at intervals; meanwhile, a node that has joined starts its preloaded process.
        """
        expected, since, saved = None, 0.0, -_SAVE_EVERY_S
        known = _ids(living_nodes())
        soon_s = self._scaling.elastic_resize_monitor_interval_s + _RESIZE_TAKES_S
        while not self._done.wait(_LOOK_EVERY_S):
            nodes = living_nodes()
            if self._workers.runtime_env:
                for node in _ids(nodes) - known:  # else its first worker would wait for all imports
                    warm_node(node, self._workers.runtime_env)
                known = _ids(nodes)
            now, possible, there = time.monotonic(), num_possible(self._workers, nodes), self._group.world_size
            if there is None or possible <= there:
                expected = None
                continue
            if expected != possible:
                expected, since = possible, now
                self._note(events.ResizeExpected(possible))
            if now - since < soon_s and now - saved >= _SAVE_EVERY_S:
                saved = now
                self._hub.broadcast(Save())


def _ids(nodes: Iterable[Mapping[str, Any]]) -> set[str]:
    return {node["NodeID"] for node in nodes}
