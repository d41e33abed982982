"""The driver's side: the interpreter with which Ray starts workers, and the preloaded process behind it.

For a Ray that is started here, the driver runs a preloaded process, which ends with the driver. On each node of a Ray
that was joined, the first worker starts one for its raylet, and later runs find it there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftexp.cluster import ray_private
from ftexp.cluster.hot_start.forker import MORE
from ftexp.cluster.hot_start.launcher import NODE, listen
from ftexp.cluster.resources import living_nodes
from ftexp.config.schema import Config, ScalingConfig
from ftexp.config.versions import package_versions
from ftexp.errors import ConfigError

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SETUP = Path(__file__).with_name("setup_worker.py")
_ASK_TIMEOUT_S = 20.0  # time limit for a node to start a task and answer


class HotStart:
    """The preloaded process of a Ray that is started here; none if `scaling.hot_start` or the platform forbids it.

    joins: whether Ray already runs, so there is nothing to start; None: decided by `scaling.address`.
    imports: modules that this run's workers import in addition to those that all workers import.
    """

    def __init__(
        self, config: ScalingConfig, num_threads: int, joins: bool | None = None, imports: Sequence[str] = ()
    ) -> None:
        self._directory: str | None = None
        joins = config.address is not None if joins is None else joins
        if config.hot_start == "off" or joins or not supported():
            return
        self._directory = tempfile.mkdtemp(
            prefix="ftexp-", dir=os.environ.get("RAY_TMPDIR")
        )  # mode 0700: only this user may connect to the socket
        with listen(self._socket) as listener:
            number = listener.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ftexp.cluster.hot_start.preloader", self._socket, str(number)],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                env={**os.environ, **_threads(num_threads), MORE: ",".join(imports)},
            )

    def python(self) -> list[str]:
        """Return a command line up to the script: the interpreter, or a fork that has everything imported, also Ray."""
        return _fork_words(self._socket) if self._directory is not None else [sys.executable]

    def runtime_env(self) -> dict[str, Any]:
        """Return the runtime env for ray.init that makes workers start as forks."""
        return {"py_executable": shlex.join(self.python())} if self._directory is not None else {}

    def raylet_settings(self) -> contextlib.AbstractContextManager[None]:
        """Make the raylet of a Ray started in this block start workers by the forker, and none in advance."""
        if self._directory is None:
            return contextlib.nullcontext()
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # without a runtime env, they would be useless
        return ray_private.workers_set_up_by(_SETUP)

    def stop(self) -> None:
        """Stop the preloaded process; running workers continue without it."""
        if self._directory is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    @property
    def _socket(self) -> str:
        return f"{self._directory}/socket"


def on_joined_nodes(config: ScalingConfig, num_threads: int) -> tuple[dict[str, Any], str | None]:
    """Return the train workers' runtime env in a Ray that was joined; empty, with the reason, if they aren't forked.

    ConfigError if they can't be forked and `scaling.hot_start=on`.
    """
    if config.hot_start == "off":
        return {}, "scaling.hot_start=off"
    if reason := _unfit_nodes():
        if config.hot_start == "on":
            raise ConfigError(f"scaling.hot_start=on, but {reason}: take auto, or off")
        return {}, reason
    environment = {**package_versions(), **_threads(num_threads), "interpreter": sys.executable, "code": str(_LAUNCHER)}
    key = hashlib.sha256(repr(sorted(environment.items())).encode()).hexdigest()[:16]
    where = f"{NODE}{tempfile.gettempdir()}/ftexp-{os.getuid()}-{key}"
    return {"py_executable": shlex.join(_fork_words(where)), "env_vars": _threads(num_threads)}, None


def imports_of(config: Config) -> list[str]:
    """Return the modules that only this run's workers import: torchmetrics alone takes seconds."""
    return ["ftexp.evaluation.metric_set"] if config.train.metrics else []


def warm_node(node: str, runtime_env: dict[str, Any]) -> None:
    """Start a node's preloaded process, without waiting. `runtime_env`: from `on_joined_nodes`."""

    def nothing() -> None:  # sent by value
        return None

    _on_node(node, nothing, runtime_env=runtime_env)


def _unfit_nodes() -> str | None:
    """Return why workers can't be forked on every node of the cluster; None if they can."""
    import ray

    if not supported():
        return "it needs Linux"
    if ray.get_runtime_context().runtime_env.get("py_executable"):
        return "the job's runtime env has a py_executable already (uv run sets one)"
    launcher, python = str(_LAUNCHER), sys.executable

    def has_both() -> bool:  # sent by value: a node may not have ftexp
        import os

        return os.access(launcher, os.R_OK) and os.access(python, os.X_OK)

    nodes = living_nodes()
    asked = [_on_node(node["NodeID"], has_both) for node in nodes]
    for node, answer in zip(nodes, asked, strict=True):
        try:
            found = ray.get(answer, timeout=_ASK_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            found = False
        if not found:
            return f"node {node['NodeManagerHostname']} has no {python} with {launcher}"
    return None


def _on_node(node: str, function: Callable[[], Any], **options: Any) -> Any:
    """Run a function, sent by value, on a node even if the node is busy; return the reference to its result."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=place, **options)
    return task.remote()


def _fork_words(where: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(_LAUNCHER), where]


def _threads(number: int) -> dict[str, str]:
    """Return variables that libraries read when they are loaded, so they must be set before the fork."""
    return {"OMP_NUM_THREADS": str(number)}


def supported() -> bool:
    """Return whether this platform has the system calls that forking workers needs, which means Linux."""
    return all(hasattr(os, name) for name in ("fork", "pidfd_open", "pipe2"))
