"""The Ray that a command runs on: started here, or joined."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ftexp.cluster import ray_private
from ftexp.cluster.hot_start.driver import HotStart
from ftexp.cluster.ray_watch import JoinedRay, OwnRay, ending_with
from ftexp.cluster.resources import may_decode
from ftexp.cluster.signals import terminable
from ftexp.config.checks.scaling import is_pair
from ftexp.config.machine import prepare_machine, usable_cpus
from ftexp.config.schema import TORCHVISION, Config
from ftexp.errors import ConfigError, RayLostError, RunFailedError

# Read by Ray Train's controller, to which Ray passes them on, on a cluster too.
_CONTROLLER = {
    # how soon a death is seen; Ray's default is 2, and polling five times a second costs training speed
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_ELASTIC_CONTROLLER = {
    # time to start a worker group before nodes are counted again: a dead node may not be known as dead yet; default 60
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
# Read by Ray when it is imported or when workers start. Only set where ftexp starts Ray itself.
_OWN_CLUSTER = {
    # for workers whose group is given up anyway; NCCL may wait for a rank that is gone
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every worker starts through `uv run` again
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process in each run that asks whether this one node is drained
}
_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_LOG_TO_STDERR": "0",
}


@dataclass(frozen=True)
class SharedRay:
    """A Ray that a sweep has started or joined, for its trials."""

    address: str
    runtime_env: dict[str, Any]  # environment of the trials' jobs
    why_cold: str | None  # why trials' workers aren't forked, if they aren't
    share: int  # trials that share this machine


@dataclass(frozen=True)
class RunningRay:
    """The Ray that this process has connected to."""

    host: str  # address of this node
    is_own: bool  # started here, so that everything in it belongs to this run
    lost: Callable[[], str | None] = lambda: None  # why it is no more, if it isn't
    close: Callable[[], None] = lambda: None  # ends the watch over it


def prepare_environment(config: Config) -> None:
    """Set what Ray reads at import; ConfigError if this machine lacks what it needs. Call before ray is imported."""
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
    """Start Ray on this machine, or join a sweep's, or `scaling.address`.

    From then on, SIGTERM and SIGHUP raise Terminated, a KeyboardInterrupt, instead of Ray's SystemExit.

    Raises:
        ConfigError: no cluster answers at the address, or it can't be given the working directory.
        RayLostError: a process of the Ray that was started here died meanwhile.
        RunFailedError: Ray doesn't start on this machine.

    decodes: whether CPUs are to decode besides the workers; None: if they may turn out to.
    """
    import ray

    address = shared.address if shared is not None else config.scaling.address
    own = address is None
    level = "INFO" if config.verbose else "ERROR"
    logging.getLogger("ray").setLevel(level)
    if not config.verbose:
        ray_private.silence_raylet_messages()
    # workers may take all cores, so CPUs for decoding are added to Ray's count; they share the same cores
    decodes = may_decode(config) if decodes is None else decodes
    decoding = (config.data.decode_cpus or usable_cpus()) if decodes else 0
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": usable_cpus() + decoding} if own else {}
    fewer = ray_private.starting_fewer_processes(config.verbose) if own else contextlib.nullcontext()
    try:
        with fewer, terminable():
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
    except BaseException:  # a signal: Ray forgets what it has started so far
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


def _not_shipped(error: Exception) -> str:
    """Return why Ray can't bring the working directory to the cluster's machines, in a line, and how to do without."""
    reason = " ".join(str(error).split())
    without = "where every machine has ftexp, set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0"
    return f"{reason} Under `uv run`, Ray ships the working directory: {without}"


def _token_hint() -> str:
    """Return what may be the reason if a cluster that runs doesn't answer: it may ask for a token that isn't set here.

    Ray sets RAY_AUTH_MODE itself where it finds a token in the home directory, which may be of another cluster.
    """
    if os.environ.get("RAY_AUTH_MODE") == "token" and {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return ""
    return '. If Ray prints "Unauthenticated", set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN as where the cluster started'


def leave_ray(running: RunningRay | None) -> None:
    """End the Ray that `start_ray` started, or leave the one that it joined; None: it did not come so far."""
    import ray

    if running is not None:
        running.close()
    ray.shutdown()


def _no_node() -> str | None:
    """Say so if the raylet has left the Ray that was started: it ends when a helper of its own dies at the start."""
    import ray

    return None if ray.cluster_resources().get("CPU") else "Ray's raylet process gave up while it started"


def _not_started(error: Exception) -> RunFailedError:
    """An error of ray.init's, as one that another try may not meet, if it isn't about this machine or the settings."""
    reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
    if isinstance(error, (OSError, ValueError, TypeError)):
        return RunFailedError(f"Ray can't be started on this machine: {reason}")
    lost = OwnRay().lost()
    ray_private.kill_started()  # also what Ray has forgotten, since it gave up halfway
    return RayLostError(lost or f"Ray did not start: {reason}")


def quiet_data(config: Config) -> None:
    """Stop Ray Data's progress bars and lines, here and in the workers, unless `verbose`."""
    from ray.data import DataContext

    if not config.verbose:
        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel("ERROR")


@contextlib.contextmanager
def decoding_ray(config: Config) -> Iterator[RunningRay]:
    """Ray for a command whose tasks read data, and no more; left again at the end.

    A decoder that takes torch would be slow to start in each of its tasks: these are forks then.
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
    """A Ray of this machine's own while the block runs, for what only reads data; yields the config without address."""
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, address=None))
    prepare_environment(config)
    with decoding_ray(config) as running:
        quiet_data(config)
        with ending_with(running.lost):
            yield config
