"""The Ray that a command runs on: started by the command, or joined."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftexp.cluster import ray_private
from ftexp.cluster.hot_start.driver import HotStart, supported
from ftexp.cluster.ray_watch import JoinedRay, OwnRay, ending_with
from ftexp.cluster.resources import living_nodes, may_decode
from ftexp.cluster.signals import terminable
from ftexp.config.checks.scaling import is_pair
from ftexp.config.machine import prepare_machine, usable_cpus
from ftexp.config.schema import TORCHVISION, Config
from ftexp.errors import ConfigError, RayLostError, RunFailedError

# Read by Ray Train's controller. Ray passes them to it, also on a cluster.
_CONTROLLER = {
    # interval at which deaths are noticed; Ray's default is 2, and 0.2 would slow training down
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # limit of a worker's answer. Ray's default is 600, and it notices a broken connection after 300: a network that was
    # cut for some seconds would cost these
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
}
_ELASTIC_CONTROLLER = {
    # start-up limit of a worker group before nodes are counted again: Ray may still count a dead node; default 60
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
# Read by Ray when it is imported or when workers start. Only set where ftexp starts Ray itself.
_OWN_CLUSTER = {
    # where Ray ends a process group (doctor's), NCCL may wait for a rank that no longer exists
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # otherwise every worker starts through `uv run` again
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per run that only asks whether this node is being drained
}
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_LOG_TO_STDERR": "0",
}
_GUARD = Path(__file__).with_name("agent_guard.py")
_RAYLET_ENDS_WITHIN_S = 15.0


@dataclass(frozen=True)
class SharedRay:
    """The Ray that a sweep has started or joined for its trials."""

    address: str
    runtime_env: dict[str, Any]  # environment of the trials' jobs
    why_cold: str | None  # reason why trials' workers aren't forked; None if they are
    share: int  # number of trials that share this machine


@dataclass(frozen=True)
class RunningRay:
    """The Ray that this process has connected to."""

    host: str  # address of this node
    is_own: bool  # started here, so everything in it belongs to this run
    lost: Callable[[], str | None] = lambda: None  # returns why Ray is dead; None while it runs
    close: Callable[[], None] = lambda: None  # stops the watch over it


def prepare_environment(config: Config) -> None:
    """Set the variables that Ray reads at import. Call before ray is imported; ConfigError if Ray can't run here."""
    if config.scaling.address is None:
        prepare_machine()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    settings = dict(_CONTROLLER)
    if is_pair(config.scaling.num_workers):
        settings |= _ELASTIC_CONTROLLER
    if config.scaling.address is None:
        settings |= _OWN_CLUSTER
    if not config.verbose:
        settings |= _QUIET
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def start_ray(
    config: Config,
    runtime_env: dict[str, Any] | None = None,
    shared: SharedRay | None = None,
    decodes: bool | None = None,
) -> RunningRay:
    """Start Ray on this machine, or join a sweep's Ray or `scaling.address`.

    From then on, SIGTERM and SIGHUP raise Terminated, a KeyboardInterrupt, instead of Ray's SystemExit.

    decodes: whether to add CPUs for decoding while the workers train; None: decided by `may_decode`.

    Raises:
        ConfigError: no cluster answers at the address, or Ray can't ship the working directory to it.
        RayLostError: a process of the Ray that is started here died during the start.
        RunFailedError: Ray can't be started on this machine.
    """
    import ray

    address = shared.address if shared is not None else config.scaling.address
    own = address is None
    level = "INFO" if config.verbose else "ERROR"
    logging.getLogger("ray").setLevel(level)
    if not config.verbose:
        ray_private.silence_raylet_messages()
    # workers may reserve all cores, so CPUs for decoding are added to Ray's count; both share the same cores
    decodes = may_decode(config) if decodes is None else decodes
    decoding = (config.data.decode_cpus or usable_cpus()) if decodes else 0
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": usable_cpus() + decoding} if own else {}
    try:
        with _own_processes(config.verbose) if own else contextlib.nullcontext(), terminable():
            context = ray.init(
                address="local" if own else address,
                log_to_driver=config.verbose,
                logging_level=level,
                configure_logging=config.verbose,
                runtime_env=runtime_env,
                **options,
            )
    except Exception as error:
        if own:
            raise _not_started(error) from error
        if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
            raise ConfigError(f"scaling.address={address}: {_not_shipped(error)}") from error
        if not isinstance(error, ConnectionError):
            raise
        raise ConfigError(f"scaling.address={address}: no Ray cluster answers there: {error}{_token_hint()}") from error
    except BaseException:  # a signal: Ray loses track of the processes that it has started
        if own:
            ray_private.kill_started()
        raise
    host = str(context.address_info["node_ip_address"])
    if own:
        watch = OwnRay()
        if (reason := watch.lost() or _no_node()) is not None:
            raise RayLostError(reason)
        return RunningRay(host, own, watch.lost)
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == context.address_info["node_id"]]
    joined = JoinedRay(sockets[0], ray.get_runtime_context().gcs_address)
    return RunningRay(host, own, joined.lost, joined.close)


@contextlib.contextmanager
def _own_processes(prints_logs: bool) -> Iterator[None]:
    """Make ray.init start no process that a command doesn't need, and guard raylet's agents."""
    guarding = ray_private.agents_guarded_by(_GUARD) if supported() else contextlib.nullcontext()
    with guarding, ray_private.starting_fewer_processes(prints_logs):
        yield


def _not_shipped(error: Exception) -> str:
    """Return one line: why Ray can't ship the working directory to the cluster, and how to avoid shipping it."""
    reason = " ".join(str(error).split())
    without = "where every machine has ftexp, set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0"
    return f"{reason} Under `uv run`, Ray ships the working directory: {without}"


def _token_hint() -> str:
    """Return a hint for a running cluster that doesn't answer: it may require a token that isn't set here.

    Ray sets RAY_AUTH_MODE itself if it finds a token in the home directory, which may be for another cluster.
    """
    if os.environ.get("RAY_AUTH_MODE") == "token" and {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return ""
    return '. If Ray prints "Unauthenticated", set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN as where the cluster started'


def leave_ray(running: RunningRay | None) -> None:
    """Stop the Ray that `start_ray` started, or disconnect from the one that it joined.

    running: None if `start_ray` did not return.
    """
    import ray

    if running is not None:
        running.close()
    ray.shutdown()


def wait_if_ending(running: RunningRay) -> None:
    """If the Ray that this process has started is dead or about to end, wait to be interrupted by its watch.

    Ray exits a process that uses the object store of a dead raylet. A raylet leaves the cluster before it ends.
    """
    if running.is_own and (running.lost() is not None or not living_nodes()):
        time.sleep(_RAYLET_ENDS_WITHIN_S)


def _no_node() -> str | None:
    """Return an error if the raylet has left the new Ray: it exits when one of its helpers dies at the start."""
    return None if living_nodes() else "Ray's raylet process gave up while it started"


def _not_started(error: Exception) -> RunFailedError:
    """Convert an error of ray.init: RunFailedError if the machine or the settings cause it, else RayLostError."""
    reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
    if isinstance(error, (OSError, ValueError, TypeError)):
        return RunFailedError(f"Ray can't be started on this machine: {reason}")
    lost = OwnRay().lost()
    ray_private.kill_started()  # including processes that Ray lost track of when it gave up
    return RayLostError(lost or f"Ray did not start: {reason}")


def quiet_data(config: Config) -> None:
    """Disable Ray Data's progress bars and log lines, here and in the workers, unless `verbose`."""
    from ray.data import DataContext

    if not config.verbose:
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel("ERROR")


@contextlib.contextmanager
def decoding_ray(config: Config) -> Iterator[RunningRay]:
    """Start or join Ray for a command whose tasks only read data; leave it at the end.

    A decoder that needs torch would make every task slow to start, so its tasks are forked.
    """
    hot_start = HotStart(config.scaling, num_threads=1) if config.data.decoder_name == TORCHVISION else None
    running = None
    try:
        with hot_start.raylet_settings() if hot_start is not None else contextlib.nullcontext():
            running = start_ray(config, hot_start.runtime_env() if hot_start is not None else None)
        yield running
    finally:
        leave_ray(running)
        if hot_start is not None:
            hot_start.stop()


@contextlib.contextmanager
def private_ray(config: Config) -> Iterator[Config]:
    """Start a Ray on this machine for a block that only reads data; yield the config without its address."""
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, address=None))
    prepare_environment(config)
    with decoding_ray(config) as running:
        quiet_data(config)
        with ending_with(running.lost):
            yield config
