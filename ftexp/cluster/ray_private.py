"""Private names of Ray that ftexp uses; more are in ray_elastic.py and ray_replacing.py.

`tests/unit/test_ray_private.py` fails when an upgrade moves one.

- The snapshot file: Ray Train would load an earlier invocation's checkpoints from it, and refuses to start if it is
  truncated or names a missing directory. ftexp finds checkpoints by their manifests, so it is removed before each fit.
- The error of a dead worker: a private class wraps Ray's public RayActorError.
- The error of a worker that did not answer Ray Train's controller in time.
- The error of a fit() whose workers never started: a private class inside the public ControllerError.
- Ray's random ids: forks of a process that has imported Ray must not share the generator that draws them. It is seeded
  at the first draw, and the decorator of actor classes draws when Ray's modules are imported.
- The thread that prints raylet's messages: it starts whatever log_to_driver says. Ray's logs have the messages too.
- The script that raylet starts for each worker: Ray's imports all of ray before it becomes the worker's interpreter.
- The processes that ray.init has started: by these, a dead Ray is noticed and its remains are killed.
- The commands by which raylet starts its agents: a guard is put before them.
- Three processes that ray.init starts and that a Ray for one command does not need.
- The actor that removes a dead controller's placement group: it can't do so in a Ray without an API server.
- Ray Train's controller: Ray gives it only the job's runtime env, and gives the workers' runtime env only to workers.
- The detector of NCCL hangs: the variables that fit() reads, and the directory in the run's where it writes its
  findings, with a subdirectory for each kind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
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
    """Return the error of a worker that stopped answering, without Ray Train's wrapper."""
    inner = getattr(error, _WRAPPED_FAILURE, error)
    assert isinstance(inner, Exception)
    return inner


def is_unanswered(error: Exception) -> bool:
    """Return whether this is Ray Train's error for a worker that did not answer its controller in time."""
    from ray.train.v2._internal import exceptions

    return isinstance(error, exceptions.WorkerHealthCheckTimeoutError)


def is_startup_failure(error: Exception) -> bool:
    """Return whether fit() ended with this error because no worker group started."""
    from ray.train.v2._internal import exceptions

    kinds = (
        exceptions.WorkerGroupStartupTimeoutError,
        exceptions.WorkerGroupStartupFailedError,
        exceptions.InsufficientClusterResourcesError,
    )
    return isinstance(getattr(error, "controller_failure", None), kinds)


def detect_nccl_hangs(within_s: float | None) -> None:
    """Make later fits report a hang in NCCL after `within_s` without progress; None: after Ray's default.

    It needs `ncclras`, of NCCL 2.28 or later, on the workers' PATH; without it, no hang is reported.
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
    """Import modules that define Ray actors, with class ids from the operating system's randomness."""
    import ray.actor

    original = ray.actor.ActorClassID

    class Drawn:
        @staticmethod
        def from_random() -> Any:
            return original(os.urandom(original.size()))

    with _replaced(ray.actor, ActorClassID=Drawn):
        import_all()


def random_id() -> str:
    """Return an id drawn the way Ray draws it."""
    from ray._raylet import UniqueID

    drawn: str = UniqueID.from_random().hex()
    return drawn


@contextlib.contextmanager
def workers_set_up_by(script: Path) -> Iterator[None]:
    """Make a raylet that is started in this block run `script`, an absolute path, instead of Ray's own script."""
    from ray._private import ray_constants

    # Ray joins this name to a directory; an absolute path replaces the directory
    with _replaced(ray_constants, SETUP_WORKER_FILENAME=str(script)):
        yield


@contextlib.contextmanager
def agents_guarded_by(script: Path) -> Iterator[None]:
    """Make a raylet that is started in this block start its agents by `script`, which gets their commands."""
    from ray._private import ray_constants, services

    build = services._build_python_executable_command_memory_profileable
    agents = (ray_constants.PROCESS_TYPE_DASHBOARD_AGENT, ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT)

    def guarded(component: str, *arguments: Any, **options: Any) -> list[str]:
        guard = [sys.executable, "-S", "-E", str(script)] if component in agents else []
        return [*guard, *build(component, *arguments, **options)]

    with _replaced(services, _build_python_executable_command_memory_profileable=guarded):
        yield


# methods that start processes nothing here needs: the autoscaler, since this Ray stays on one machine; the API server,
# which without a dashboard only reports usage; the process that reads workers' logs to print them here
_AUTOSCALER, _USAGE, _LOG_READER = "start_monitor", "start_api_server", "start_log_monitor"


@contextlib.contextmanager
def starting_fewer_processes(prints_logs: bool) -> Iterator[None]:
    """Make ray.init skip the processes that a command does not need: half of the cost of a start."""
    from ray._private.node import Node

    counts_usage = os.environ.get("RAY_USAGE_STATS_ENABLED") != "0"
    names = [_AUTOSCALER, *([] if counts_usage else [_USAGE]), *([] if prints_logs else [_LOG_READER])]
    with _replaced(Node, **dict.fromkeys(names, lambda *_, **__: None)):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a module or a class in this block, and restore them."""
    originals = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)


def fitted(trainer: DataParallelTrainer, controller: type[Any] | None = None) -> Result:
    """Fit `trainer`, with Ray Train's internals adapted as follows.

    Without an API server, the placement group's cleaner is omitted. This actor outlives the controller and asks the
    API server whether the controller died. Without one, its first request takes 40 s to fail, and Ray Train waits up to
    12 s of that before a fit that has ended returns.

    The controller, and the actors that it creates for each worker group, get the workers' runtime env: if workers are
    forked, so are these actors. Otherwise each would import Ray Train, 2 CPU-seconds, while workers wait.

    An elastic group counts the nodes again before it starts: see ray_elastic.py.

    controller: a subclass of Ray Train's controller, to use in its place.
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
    """The module `ray` as the trainer sees it: adds a runtime env to its only actor, Ray Train's controller."""

    def __init__(self, ray: Any, runtime_env: Mapping[str, Any]) -> None:
        self._ray, self._runtime_env = ray, runtime_env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray, name)

    def remote(self, *, runtime_env: Mapping[str, Any], **options: Any) -> Any:
        variables = {**self._runtime_env.get("env_vars", {}), **runtime_env["env_vars"]}
        return self._ray.remote(**options, runtime_env={**self._runtime_env, "env_vars": variables})


def has_api_server() -> bool:
    """Return whether the connected Ray has an API server: the dashboard's process, also without a dashboard."""
    import ray._private.ray_constants as constants
    from ray.experimental.internal_kv import _internal_kv_get

    return bool(_internal_kv_get(constants.DASHBOARD_ADDRESS, namespace=constants.KV_NAMESPACE_DASHBOARD))


def started_processes() -> dict[str, subprocess.Popen[bytes]]:
    """Return the vital processes of a Ray that was started here, by name; empty for a Ray that was joined."""
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
    """Kill every process that ray.init has started here, including those it lost track of when it gave up."""
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
