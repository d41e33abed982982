"""Ray Train's controller, with a single worker started again in its slot: names of Ray's that aren't public, as in
ray_private.py. `tests/unit/test_ray_private.py` fails when an upgrade moves one.

Ray Train replaces members of its replica groups, which it keeps for TorchFT: there each is a world of its own. Here
the group stays one world. So the backend doesn't opt in to replica groups, and where a replacement fails, for whatever
reason, all workers are started again as ever.
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

_ANSWER_S = 2.0  # that a worker may take to answer a question


def is_replacement(group: Any) -> bool:
    """Whether the backend is called for a worker that takes the place of another."""
    return isinstance(group, ReplicaGroup)


def set_environment(group: Any) -> None:
    """Set RANK, WORLD_SIZE and what else torch's launcher sets, for code of the user's."""
    group.execute(_set_torch_distributed_env_vars)


class _SameShards(ExecutionGroupCallback):  # type: ignore[misc]
    """Gives a worker the data sets that the others have; Ray would make new ones, for a world of one."""

    def __init__(self, datasets: DatasetsCallback) -> None:
        self._datasets = datasets

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        context = self._datasets._data_context
        controllers.ray.get([worker.execute_async(DataContext._set_current, context) for worker in workers])
        return {"dataset_shard_provider": [self._datasets._dataset_shard_provider] * len(workers)}


class SlotWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """A worker that is started again has the ranks of the one that it replaces; Ray would have it be local rank 0."""

    on_failure: Callable[[list[Any]], None]  # called with the workers that live, before anything is done about it
    _kept: Any = None
    _execution_group_callbacks: list[Any]

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> Any:
        statuses = super()._poll_workers_and_collect_errors(timeout)
        if any(status.error is not None for status in statuses):
            workers = zip(self.get_workers(), statuses, strict=True)
            self.on_failure([worker for worker, status in workers if status.error is None])
        return statuses

    def replace_replica_group(self, replica_group_index: int) -> None:
        """Start the worker of this rank again."""
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
    """Asks its workers at once when one on its own node has ended, and not only when it is time to."""

    _latest_poll_time: float
    _health_check_interval_s: float

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seen_dead: set[int] = set()  # each is a reason once: Ray may hear of it later

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
    """Starts one worker again where it can, and all of them otherwise."""

    worker_group_cls = SlotWorkerGroup

    @abc.abstractmethod
    def others(self, can: Callable[[Callable[[], bool]], bool]) -> None:
        """Note what the others can do, where a worker has failed.

        can: whether it alone has failed, and what `can` is given is true in all other workers' processes.
        """

    @abc.abstractmethod
    def may_replace(self) -> bool:
        """Whether a replacement was decided upon."""

    @abc.abstractmethod
    def question(self, timeout_s: float) -> tuple[Callable[..., Any], Any]:
        """Return what to run on each other worker while the one that died is started again, with its argument."""

    @abc.abstractmethod
    def invitation(self, rank: int, answers: list[Any]) -> tuple[Callable[..., None], Any] | None:
        """Return what to run on all workers now that `rank` was started again, with its argument; None: a restart."""

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
        """Replace on a thread: where a node has gone, its slot may never come back, and Ray waits for it for ever."""
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
            except Exception:  # whatever it is, a restart follows
                controllers.logger.warning("rank %d could not be replaced", rank, exc_info=True)

        thread = threading.Thread(target=attempt, daemon=True, name="replace")
        thread.start()
        thread.join(timeout_s)
        return succeeded == [True]


async def first_ended(pids: set[int], timeout_s: float) -> set[int]:
    """Wait until one of these processes, of this machine, has ended, and return which have; none once it is time."""
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
            except OSError:  # the system has none, or no more files: it is asked when it is time
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
    """Whether there are so many workers, and each answers what it is asked with yes."""
    try:
        answers = controllers.ray.get([worker.execute_async(asked) for worker in workers], timeout=_ANSWER_S)
    except (controllers.ray.exceptions.RayError, TimeoutError):  # another one has died
        return False
    return len(answers) == count and all(answers)
