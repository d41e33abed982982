"""Every name of Ray's that isn't public. `tests/unit/test_ray_private.py` fails when an upgrade moves one.

- The snapshot file: Ray Train would take up checkpoints of an earlier call from it, and refuses to start if it
  is truncated or names a missing directory. Ours follow from manifests, so it is dropped before each fit.
- The error of a dead worker wraps Ray's public RayActorError in a private class.
- What ends a fit() whose workers never began is a private class inside the public ControllerError.
- Forks of a process that has imported Ray must not share its random numbers, from which Ray makes its ids. Its
  generator is seeded at the first draw, and the decorator of actor classes draws when Ray's modules are imported.
- The thread that prints raylet's messages starts whatever log_to_driver says; what it prints is in Ray's logs too.
- The script that raylet starts for each worker, which imports all of ray to become the worker's interpreter.
- The processes that ray.init has started: by them a Ray that has died is noticed, and ended for good.
- Three that it starts, and that a Ray for one command has no use for.
- The actor that would remove a dead controller's placement group, and can't in such a Ray.
- Train's controller, which Ray gives the runtime env of the job alone, and its workers' to nobody but these.
- The detector of hangs in NCCL: the variables that fit() reads, and the directory of the run in which it leaves what it
  has found, a directory for each kind of findings.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train import Result
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

SNAPSHOT = "checkpoint_manager_snapshot.json"
NCCL_FINDINGS = "hang_detector"
_NCCL_DETECTOR = "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR"
_NCCL_POLL_S = "RAY_TRAIN_NCCL_RAS_MIN_POLL_INTERVAL_S"
_NCCL_CONFIRM_S = "RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S"
_MAX_NCCL_POLL_S = 15.0  # Ray's default
_WRAPPED_FAILURE = "health_check_failure"
_VITAL = {"gcs_server": "GCS", "raylet": "raylet"}  # kind of process -> its name in Ray's documentation


def unwrap(error: Exception) -> Exception:
    """The error of a worker that stopped answering, without Ray Train's wrapper."""
    inner = getattr(error, _WRAPPED_FAILURE, error)
    assert isinstance(inner, Exception)
    return inner


def is_startup_failure(error: Exception) -> bool:
    """Whether fit() ended with this because no group of workers began."""
    from ray.train.v2._internal import exceptions

    kinds = (
        exceptions.WorkerGroupStartupTimeoutError,
        exceptions.WorkerGroupStartupFailedError,
        exceptions.InsufficientClusterResourcesError,
    )
    return isinstance(getattr(error, "controller_failure", None), kinds)


def detect_nccl_hangs(within_s: float | None) -> None:
    """Have coming fits observe NCCL, and leave what they find `within_s` of standing still; None: as Ray does.

    It needs `ncclras`, of NCCL 2.28 or later, on the workers' PATH, and does without where there is none.
    """
    os.environ.setdefault(_NCCL_DETECTOR, "1")
    if within_s is not None:
        os.environ.setdefault(_NCCL_CONFIRM_S, str(within_s))
        os.environ.setdefault(_NCCL_POLL_S, str(min(_MAX_NCCL_POLL_S, within_s / 4)))


def silence_raylet_messages() -> None:
    """Keep raylet's messages off this process's standard output. Call before ray.init."""
    import ray._private.worker as worker

    def ignore(*_: Any) -> None:
        return None

    worker.listen_error_messages = ignore


def import_without_drawing(import_all: Callable[[], None]) -> None:
    """Import what defines Ray actors, while their class ids come from the operating system's randomness."""
    import ray.actor

    original = ray.actor.ActorClassID

    class Drawn:
        @staticmethod
        def from_random() -> Any:
            return original(os.urandom(original.size()))

    with _replaced(ray.actor, ActorClassID=Drawn):
        import_all()


def random_id() -> str:
    """An id as Ray draws it."""
    from ray._raylet import UniqueID

    drawn: str = UniqueID.from_random().hex()
    return drawn


@contextlib.contextmanager
def workers_set_up_by(script: Path) -> Iterator[None]:
    """Have the raylet that is started meanwhile run `script`, an absolute path, where it would run Ray's own."""
    from ray._private import ray_constants

    # it is joined to a directory, which an absolute path replaces
    with _replaced(ray_constants, SETUP_WORKER_FILENAME=str(script)):
        yield


# what starts a process without which nothing here is missed: the autoscaler, of a Ray that stays on one machine; the
# dashboard without a dashboard, which then counts usage alone; what reads workers' logs in order to print them here
_AUTOSCALER, _USAGE, _LOG_READER = "start_monitor", "start_api_server", "start_log_monitor"


@contextlib.contextmanager
def starting_fewer_processes(prints_logs: bool) -> Iterator[None]:
    """Have ray.init start a Ray without the processes that a command has no use for: half of what a start costs."""
    from ray._private.node import Node

    counts_usage = os.environ.get("RAY_USAGE_STATS_ENABLED") != "0"
    names = [_AUTOSCALER, *([] if counts_usage else [_USAGE]), *([] if prints_logs else [_LOG_READER])]
    with _replaced(Node, **dict.fromkeys(names, lambda *_, **__: None)):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a module or a class, and restore them."""
    originals = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def fitted(trainer: DataParallelTrainer, controller: type[Any] | None = None) -> Result:
    """Fit `trainer`, without the actor that outlives its controller where that actor can't do its work.

    It removes the placement group of a controller that died, as it learns from Ray's API server. Where none runs, its
    first question takes 40 s to fail, and Ray Train waits for that up to 12 s before a fit that has ended returns.

    The controller, and with it the actors that it creates for each group of workers, has the workers' runtime env:
    where these are forked, so are those, each of which would import Ray Train for 2 CPU-seconds while workers wait.

    An elastic group counts the nodes again before it starts: see ray_elastic.py. controller: a class derived from Ray
    Train's, to use in its place.
    """
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api import data_parallel_trainer

    from ftexp.cluster.ray_elastic import scaling_policy

    if not has_api_server():
        create = trainer._create_default_callbacks
        trainer._create_default_callbacks = lambda: [
            callback for callback in create() if not isinstance(callback, PlacementGroupCleanerCallback)
        ]
    with _replaced(
        data_parallel_trainer,
        ray=_RayOfTrainer(data_parallel_trainer.ray, trainer.run_config.worker_runtime_env),
        create_scaling_policy=scaling_policy,
        TrainController=controller or data_parallel_trainer.TrainController,
    ):
        return trainer.fit()


class _RayOfTrainer:
    """The module `ray` as the trainer sees it, whose one actor, Train's controller, has more of a runtime env."""

    def __init__(self, ray: Any, runtime_env: Mapping[str, Any]) -> None:
        self._ray, self._runtime_env = ray, runtime_env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def remote(self, *, runtime_env: Mapping[str, Any], **options: Any) -> Any:
        variables = {**self._runtime_env.get("env_vars", {}), **runtime_env["env_vars"]}
        return self._ray.remote(**options, runtime_env={**self._runtime_env, "env_vars": variables})


def has_api_server() -> bool:
    """Whether the Ray that this process is connected to has one: the dashboard's process, also without a dashboard."""
    import ray._private.ray_constants as constants
    from ray.experimental.internal_kv import _internal_kv_get

    return bool(_internal_kv_get(constants.DASHBOARD_ADDRESS, namespace=constants.KV_NAMESPACE_DASHBOARD))


def started_processes() -> dict[str, subprocess.Popen[bytes]]:
    """The processes that a Ray started here can't do without, by what they are called; none of one that was joined."""
    import ray._private.worker as worker

    node = worker._global_node
    found = node.all_processes if node is not None else {}
    return {name: found[kind][0].process for kind, name in _VITAL.items() if kind in found}


def logs_dir() -> str:
    """Return the directory of the logs of the Ray that this process is connected to."""
    import ray._private.worker as worker

    node = worker._global_node
    return str(node.get_logs_dir_path()) if node is not None else "none"


def kill_started() -> None:
    """End every process that ray.init has started here, at once; also where it gave up halfway, and forgot them."""
    import ray
    import ray._private.worker as worker

    node = worker._global_node
    for infos in node.all_processes.values() if node is not None else ():
        for info in infos:
            info.process.kill()
            info.process.wait()
    code = f"{Path(ray.__file__).parent}/".encode()
    for entry in Path("/proc").glob("[0-9]*"):  # nothing where there is no /proc
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if parent == os.getpid() and any(word.startswith(code) for word in words):
                os.kill(int(entry.name), signal.SIGKILL)
