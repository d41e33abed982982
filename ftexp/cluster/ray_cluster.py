"""How many workers with what, and the Ray that they run on."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftexp.cluster import ray_private
from ftexp.cluster.ray_watch import JoinedRay, OwnRay, ending_with
from ftexp.config.checks.validate import num_local_gpus
from ftexp.config.machine import prepare_machine
from ftexp.config.schema import AUTO, Config, DataConfig, ScalingConfig
from ftexp.config.source_names import can_stream
from ftexp.errors import ConfigError, RayLostError, RunFailedError

_MAX_AUTO_CPU_WORKERS = 2  # small models gain nothing from more processes on one machine
_MAX_AUTO_THREADS = 8

# Read by Ray when it is imported or when workers start. Only set where ftexp starts Ray itself.
_OWN_CLUSTER = {
    # how soon a death is seen; Ray's default is 2, and polling five times a second costs training speed
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
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
    "GLOG_minloglevel": "3",
}


@dataclass(frozen=True)
class Workers:
    """`ScalingConfig` with every `auto` decided."""

    num_workers: int | tuple[int, int]
    use_gpu: bool
    resources_per_worker: dict[str, float]
    runtime_env: dict[str, Any] = field(default_factory=dict)  # Ray's, for the train workers alone

    @property
    def num_threads(self) -> int:
        """Of one worker: as many as it has whole CPUs, and one at least."""
        return max(1, int(self.resources_per_worker.get("CPU", 1)))

    @property
    def most(self) -> int:
        """The largest number of workers that may run at once."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def fewest(self) -> int:
        """The smallest number of workers that may run at once."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    def __str__(self) -> str:
        count = self.num_workers if isinstance(self.num_workers, int) else "{} to {}".format(*self.num_workers)
        parts = ", ".join(f"{value:g} {name}" for name, value in self.resources_per_worker.items())
        return f"{count} × ({parts})"


@dataclass(frozen=True)
class SharedRay:
    """A Ray that a sweep has started or joined, for its trials."""

    address: str
    runtime_env: dict[str, Any]  # of the trials' jobs
    why_cold: str | None  # why trials' workers aren't forked, if they aren't
    share: int  # trials that share this machine


@dataclass(frozen=True)
class RunningRay:
    """The Ray that this process has connected to."""

    host: str  # this node's address
    is_own: bool  # started here, so that everything in it is this run's
    lost: Callable[[], str | None] = lambda: None  # why it is no more, if it isn't


def decide_workers(config: ScalingConfig, num_cpus: int | None = None, share: int = 1) -> Workers:
    """Fill in `auto`: a worker for each GPU, or up to two on CPU; the machine's cores shared out as threads.

    share: runs that are to fit on the machine side by side; numbers that are given are kept all the same.
    """
    joins = config.address is not None
    assert not (joins and config.num_workers == AUTO), "refused by ftexp.config.checks.validate"
    cpus = 0 if joins else num_cpus or usable_cpus()
    use_gpu = config.use_gpu if isinstance(config.use_gpu, bool) else not joins and num_local_gpus() > 0
    num_workers: int | tuple[int, int]
    if config.num_workers == AUTO:
        num_workers = max(1, num_local_gpus() // share if use_gpu else min(cpus // share, _MAX_AUTO_CPU_WORKERS))
    elif isinstance(config.num_workers, int):
        num_workers = config.num_workers
    else:
        num_workers = (config.num_workers[0], config.num_workers[1])
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    threads = 1 if joins else max(1, min(cpus // share // most, _MAX_AUTO_THREADS))
    resources = dict(config.resources_per_worker or {})
    resources.setdefault("CPU", threads)
    if use_gpu:
        resources.setdefault("GPU", 1)
    if not joins and resources["CPU"] * most > cpus:
        raise ConfigError(
            f"scaling.num_workers={most} with {resources['CPU']:g} CPU each want more than the {cpus} cores of this "
            "machine: take fewer, or give scaling.resources_per_worker={CPU: 0.5}"
        )
    return Workers(num_workers, use_gpu, resources)


def num_shares(configs: Sequence[Config], most: int | None) -> int:
    """How many of these runs are to share this machine at once: as many as it has cores, or GPUs, if not `most`."""
    use_gpu = any(config.scaling.use_gpu is True for config in configs) or (
        any(config.scaling.use_gpu == AUTO for config in configs) and num_local_gpus() > 0
    )
    slots = num_local_gpus() if use_gpu else usable_cpus()
    return max(1, min(len(configs), slots, most or slots))


def may_stream(config: DataConfig) -> bool:
    """Whether the data may turn out to be streamed."""
    return config.feed != "cached" and can_stream(config.name)


def usable_cpus() -> int:
    """Cores that this process may run on; macOS doesn't tell, so there all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_environment(config: Config) -> None:
    """Set what Ray reads at import; ConfigError if this machine lacks what it needs. Call before ray is imported."""
    if config.scaling.address is None:
        prepare_machine()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    settings = {} if config.scaling.address else dict(_OWN_CLUSTER)
    if not config.verbose:
        settings |= _QUIET
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def no_workers() -> Workers:
    """For commands that need none."""
    return Workers(0, use_gpu=False, resources_per_worker={})


def decoding_cpus(config: Config, workers: Workers) -> int:
    """CPUs of the cluster that may decode while the workers train; ConfigError if the workers leave none."""
    import ray

    taken = workers.fewest * workers.resources_per_worker.get("CPU", 1)
    there = ray.cluster_resources().get("CPU", 0)
    if there - taken < 1:
        raise ConfigError(
            f"data.feed=streaming decodes on CPUs that the workers leave, and {workers.fewest} workers take {taken:g} "
            f"of the cluster's {there:g}: take fewer workers, scaling.resources_per_worker={{CPU: 0.5}}, or "
            "data.feed=cached"
        )
    return config.data.decode_cpus or int(there - taken)


def import_meanwhile(module: str) -> threading.Thread:
    """Import a module that takes seconds while Ray starts, which is mostly waiting for its processes; join it then."""
    # it registers a lock with fork(): imported on the thread while Ray's processes are forked, that would be released
    # without having been taken, which Python complains of on the terminal
    import concurrent.futures.thread  # noqa: F401

    thread = threading.Thread(target=importlib.import_module, args=(module,), name="import")
    thread.start()
    return thread


def start_ray(
    config: Config,
    runtime_env: dict[str, Any] | None = None,
    shared: SharedRay | None = None,
    decodes: bool | None = None,
) -> RunningRay:
    """Start Ray on this machine, or join a sweep's, or `scaling.address`.

    Raises:
        ConfigError: no cluster answers at the address.
        RayLostError: a process of the Ray that was started here died meanwhile.
        RunFailedError: Ray doesn't start on this machine.

    decodes: whether CPUs are to decode beside the workers; None: if the data may be streamed.
    """
    import ray

    address = shared.address if shared is not None else config.scaling.address
    own = address is None
    level = "INFO" if config.verbose else "ERROR"
    logging.getLogger("ray").setLevel(level)
    if not config.verbose:
        ray_private.silence_raylet_messages()
    # a machine's workers may take all its cores: what decodes beside them is counted on top, and shares them
    decodes = may_stream(config.data) if decodes is None else decodes
    decoding = (config.data.decode_cpus or usable_cpus()) if decodes else 0
    options: dict[str, Any] = {"include_dashboard": False, "num_cpus": usable_cpus() + decoding} if own else {}
    try:
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
        if not isinstance(error, ConnectionError):
            raise
        raise ConfigError(f"scaling.address={address}: no Ray cluster answers there: {error}") from error
    host = str(context.address_info["node_ip_address"])
    if own:
        watch = OwnRay()
        if (reason := watch.lost() or _no_node()) is not None:
            raise RayLostError(reason)
        return RunningRay(host, own, watch.lost)
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == context.address_info["node_id"]]
    return RunningRay(host, own, JoinedRay(sockets[0], ray.get_runtime_context().gcs_address).lost)


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
def private_ray(config: Config) -> Iterator[Config]:
    """A Ray of this machine's own while the block runs, for what only reads data; yields the config without address."""
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, address=None))
    prepare_environment(config)
    import ray

    running = start_ray(config)
    quiet_data(config)
    try:
        with ending_with(running.lost):
            yield config
    finally:
        ray.shutdown()


def num_possible(workers: Workers) -> int:
    """How many workers the cluster's nodes have room for, were nothing else on them; as many as are wanted at most."""
    import ray

    wanted = {name: amount for name, amount in workers.resources_per_worker.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min((int(node.get(name, 0) / amount) for name, amount in wanted.items()), default=0) for node in nodes)
    return min(room, workers.most)


def lacking_resources(workers: Workers) -> str | None:
    """Say what the cluster lacks, as it is now, for the fewest workers that were asked for; None if it has it."""
    import ray

    fewest = workers.fewest
    for name, amount in workers.resources_per_worker.items():
        there = ray.cluster_resources().get(name, 0)
        if there < fewest * amount:
            return (
                f"scaling.num_workers={fewest} with {amount:g} {name} each need {fewest * amount:g} {name}, and the "
                f"cluster has {there:g}"
            )
    return None
