"""Names of Ray's that aren't public. When one of these fails after an upgrade, mend ftexp/ray_private.py."""

import inspect

import ray.exceptions
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from ftexp import ray_private


def test_the_snapshot_has_the_name_that_is_dropped_before_a_fit():
    assert ray_private.SNAPSHOT == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_the_error_of_a_dead_worker_is_unwrapped():
    died = ray.exceptions.ActorDiedError()
    assert ray_private.unwrap(WorkerHealthCheckFailedError("no answer", died)) is died
    bug = TypeError("x")
    assert ray_private.unwrap(bug) is bug


def test_raylets_messages_are_printed_by_the_thread_that_is_silenced(monkeypatch):
    import ray._private.worker as worker

    assert "listen_error_messages" in inspect.getsource(worker.connect)
    monkeypatch.setattr(worker, "listen_error_messages", worker.listen_error_messages)
    ray_private.silence_raylet_messages()
    assert worker.listen_error_messages(None, None) is None
