"""A controller of Ray Train that restarts a single worker in its slot.

Uses private names of Ray; `tests/unit/test_ray_private.py` fails when an upgrade moves one.

Ray Train replaces members of its replica groups, which exist for TorchFT, where each group is a world of its own. Here
all workers stay one world. So the backend doesn't opt in to replica groups, and if a replacement fails for any reason,
all workers are restarted as usual.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from ray.data import DataContext
from ray.train.torch.config import _set_torch_distributed_env_vars
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ExecutionGroupCallback
from ray.train.v2._internal.execution.controller import controller as controllers
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup

_ANSWER_S = 2.0  # time limit of a worker's answer to a question


def is_replacement(group: Any) -> bool:
    """Return whether the backend is called for a worker that replaces another."""
    return isinstance(group, ReplicaGroup)


def set_environment(group: Any) -> None:
    """Set RANK, WORLD_SIZE and the other variables of torch's launcher, for the user's code."""
    group.execute(_set_torch_distributed_env_vars)


class _SameShards(ExecutionGroupCallback):  # type: ignore[misc]
    """Callback that gives a replacement the others' datasets; Ray would create new ones, for a world of one."""

    def __init__(self, datasets: DatasetsCallback) -> None:
        self._datasets = datasets

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        context = self._datasets._data_context
        controllers.ray.get([worker.execute_async(DataContext._set_current, context) for worker in workers])
        return {"dataset_shard_provider": [self._datasets._dataset_shard_provider] * len(workers)}


class SlotWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Worker group whose replacements keep the ranks of the workers they replace; Ray would make them local rank 0."""

    on_failure: Callable[[list[Any]], None]  # called with the living workers, before any reaction to the failure
    _kept: Any = None
    _execution_group_callbacks: list[Any]

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> Any:
        statuses = super()._poll_workers_and_collect_errors(timeout)
        if any(status.error is not None for status in statuses):
            workers = zip(self.get_workers(), statuses, strict=True)
            self.on_failure([worker for worker, status in workers if status.error is None])
        return statuses

    def replace_replica_group(self, replica_group_index: int) -> None:
        """Restart the worker of this rank."""
        (dead,) = self._replica_groups[replica_group_index].get_workers()
        self._kept = dead.distributed_context
        try:
            super().replace_replica_group(replica_group_index)
        finally:
            self._kept = None

    def _init_train_context(self, workers: list[Any], sync_actor: Any) -> None:
        if self._kept is None:
            super()._init_train_context(workers, sync_actor)
            return
        workers[0].distributed_context = self._kept
        callbacks = self._execution_group_callbacks
        self._execution_group_callbacks = [
            _SameShards(each) if isinstance(each, DatasetsCallback) else each for each in callbacks
        ]
        try:
            super()._init_train_context(workers, sync_actor)
        finally:
            self._execution_group_callbacks = callbacks


class WatchingController(controllers.TrainController):  # type: ignore[misc]
    """Controller that polls its workers as soon as one on its own node has ended, not only at the next health check."""

    _latest_poll_time: float
    _health_check_interval_s: float

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seen_dead: set[int] = set()  # each triggers one poll: Ray may notice the death later

    async def _poll_workers(self) -> Any:
        since_s = controllers.time_monotonic() - self._latest_poll_time
        own = controllers.ray.get_runtime_context().get_node_id()
        workers = [worker.metadata for worker in self._worker_group.get_workers()]
        pids = {each.pid for each in workers if each.node_id == own}
        self._seen_dead &= pids
        if dead := await first_ended(pids - self._seen_dead, self._health_check_interval_s - since_s):
            self._seen_dead |= dead
            self._latest_poll_time = float("-inf")
        return await super()._poll_workers()


class ReplacingController(WatchingController, abc.ABC):
    """Controller that restarts a single worker where possible, and all of them otherwise."""

    worker_group_cls = SlotWorkerGroup

    @abc.abstractmethod
    def others(self, can: Callable[[Callable[[], bool]], bool]) -> None:
        """Note the state of the other workers after a worker has failed.

        can: returns whether only one worker has failed, and its argument returns True in all other workers.
        """

    @abc.abstractmethod
    def may_replace(self) -> bool:
        """Return whether the failed worker is to be replaced."""

    @abc.abstractmethod
    def question(self, timeout_s: float) -> tuple[Callable[..., Any], Any]:
        """Return the function to run on each other worker while the dead one is restarted, and its argument."""

    @abc.abstractmethod
    def invitation(self, rank: int, answers: list[Any]) -> tuple[Callable[..., None], Any] | None:
        """Return the function to run on all workers after `rank` was restarted, and its argument; None: restart all."""

    def _start_worker_group(self, *arguments: Any, **named: Any) -> None:
        super()._start_worker_group(*arguments, **named)
        group = self._worker_group
        group.on_failure = lambda living: self.others(lambda asked: _all(asked, living, len(group) - 1))

    def _execute_resize_decision(self, decision: Any) -> Any:
        rank = self._failed_alone()
        if rank is None or not self._replaced(rank):
            return super()._execute_resize_decision(decision)
        return controllers.TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(), previous_state=self._state, next_state=RunningState()
        )

    def _failed_alone(self) -> int | None:
        group = self._worker_group
        status = group.get_latest_poll_status() if group is not None and group.has_started() else None
        failed = list(status.errors) if status is not None else []
        return failed[0] if len(failed) == 1 and self.may_replace() else None

    def _replaced(self, rank: int) -> bool:
        """Replace the worker on a thread: if its node is gone, its slot may never return, and Ray waits for ever."""
        succeeded: list[bool] = []
        group = self._worker_group
        timeout_s = group._worker_group_start_timeout_s

        def replace() -> None:
            others = [worker for other, worker in enumerate(group.get_workers()) if other != rank]
            asked = [worker.execute_async(*self.question(timeout_s)) for worker in others]
            group.replace_replica_group(rank)
            found = controllers.ray.get(asked, timeout=timeout_s)
            if (invitation := self.invitation(rank, found)) is not None:
                group.execute(*invitation)
                succeeded.append(True)

        def attempt() -> None:
            try:
                replace()
            except Exception:  # of any kind: all workers are restarted then
                controllers.logger.warning("rank %d could not be replaced", rank, exc_info=True)

        thread = threading.Thread(target=attempt, daemon=True, name="replace")
        thread.start()
        thread.join(timeout_s)
        return succeeded == [True]


async def first_ended(pids: set[int], timeout_s: float) -> set[int]:
    """Wait until one of these processes on this machine has ended; return those that have, or none at the timeout."""
    ended = set[int]()
    loop, noticed, watched = asyncio.get_running_loop(), asyncio.Event(), dict[int, int]()

    def note(pid: int) -> None:
        ended.add(pid)
        noticed.set()

    try:
        for pid in pids:
            try:
                watched[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                note(pid)
            except OSError:  # no pidfd support, or no descriptor left: the health check covers it
                continue
            else:
                loop.add_reader(watched[pid], note, pid)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(noticed.wait(), max(0.0, timeout_s))
    finally:
        for descriptor in watched.values():
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return ended


def _all(asked: Callable[[], bool], workers: list[Any], count: int) -> bool:
    """Return whether there are `count` workers, and `asked` returns True on each."""
    try:
        answers = controllers.ray.get([worker.execute_async(asked) for worker in workers], timeout=_ANSWER_S)
    except (controllers.ray.exceptions.RayError, TimeoutError):  # another worker has died
        return False
    return len(answers) == count and all(answers)
