"""Forker of one raylet's workers: a fork of the preloaded process that has also imported Ray.

At import, Ray reads the raylet, the settings and the cluster's token from the environment, which the first worker
sends. Processes without a raylet, such as the drivers of a sweep's trials, have a forker of their own. A forker ends
when the preloaded process ends, or after a while without requests.

When its raylet ends, it kills its workers, which would continue for ten seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftexp.cluster.hot_start.launcher import readable
from ftexp.cluster.importing import importing_for_good, uncollected
from ftexp.cluster.process_exit import code_of

WITH_THE_CLUSTER = (
    *("ray", "ray.train", "ray.train.torch", "ray.data", "ftexp.worker.loop", "ftexp.driver.trainer"),
    *("ftexp.data.feeds.cached", "ftexp.plugins"),
    # modules that Ray imports inside functions while a worker starts; there they would take 0.8 CPU-seconds
    *("pyarrow.json", "pydantic.v1", "ray.tune", "ray.data._internal.execution.streaming_executor"),
    *("ray.data._internal.logical.optimizers", "ray.data._internal.planner.planner"),
)
MORE = "FTEXP_PRELOAD"  # more modules that this job's workers import, separated by commas
ANSWERED_BY_A_WORKER = (signal.SIGINT, signal.SIGTERM)  # ignored by the preloaded process and the forkers
MARK = "FTEXP_HOT_START"  # environment variable that a forked worker has
_IDLE_S = 300.0  # time without a worker after which it ends; a job needs less between two worker groups


def import_all(names: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
    """Import those of these modules that exist.

    without: modules that they import if installed, and that no worker uses; their import is made to fail.
    """
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]  # None: an ImportError
    with importing_for_good():
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    for name in without:
        del sys.modules[name]


class Forker:
    """Forker of workers: forks a child for each launcher's request, and sends the launcher its pid and wait status."""

    def __init__(self, channel: socket.socket, environment: dict[str, str]) -> None:
        self._channel = channel
        self._children: dict[int, socket.socket] = {}  # pid -> connection to its launcher
        self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        raylet = environment.get("RAY_RAYLET_PID")
        self._raylet = [os.pidfd_open(int(raylet))] if raylet else []  # empty once it has ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._is_fit = self._import_ray()

    def _import_ray(self) -> bool:
        """Import Ray; return whether forks draw different ids. If a new Ray breaks that, workers aren't forked."""
        from ftexp.cluster import ray_private

        more = filter(None, os.environ.get(MORE, "").split(","))
        with uncollected():  # also covers the import of Ray itself
            ray_private.import_without_drawing(lambda: import_all((*WITH_THE_CLUSTER, *more)))
        return len({_in_a_fork(ray_private.random_id) for _ in range(2)}) == 2

    def serve(self) -> None:
        """Serve until the preloaded process or the raylet ends, or until _IDLE_S without a worker or a request.

        A raylet's forker ends after its workers: a killed driver ends the preloaded process first, then the raylet.
        """
        signal.set_wakeup_fd(self._wakeup[1])
        signal.signal(signal.SIGCHLD, lambda *_: None)
        sources, has_raylet = [self._channel.fileno()], bool(self._raylet)
        while sources or (has_raylet and self._children):
            launchers = {connection.fileno(): pid for pid, connection in self._children.items()}
            watched = [*sources, *self._raylet, self._wakeup[0], *launchers]
            ready = readable(watched, None if launchers else _IDLE_S)
            if not ready:
                return
            if any(descriptor in ready for descriptor in self._raylet):
                self._raylet_ended()
                sources.clear()
            if self._wakeup[0] in ready:
                os.read(self._wakeup[0], 4096)
                self._reap()
            for descriptor in ready:
                if descriptor in launchers:
                    self._launcher_died(launchers[descriptor])
            if sources and self._channel.fileno() in ready and not self._take():
                sources.clear()

    def _raylet_ended(self) -> None:
        """Kill its workers, whose launchers end with them."""
        os.close(self._raylet.pop())
        for pid in self._children:
            _kill(pid)

    def _launcher_died(self, pid: int) -> None:
        """Kill its child. A launcher sends nothing after its request, so a readable connection has closed."""
        if pid in self._children:
            _kill(pid)

    def _reap(self) -> None:
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                connection = self._children.pop(pid)
                with contextlib.suppress(OSError):  # the launcher has died
                    connection.sendall(status.to_bytes(8, "big"))
                connection.close()

    def _take(self) -> bool:
        """Fork a worker for the next launcher's request; return False once the preloaded process has ended."""
        try:
            request, (asker, *descriptors) = receive(self._channel, 4)
        except (OSError, ValueError):
            return False
        connection = socket.socket(fileno=asker)
        try:
            # the launcher may have timed out and become a plain interpreter: a second worker must not start
            if not self._is_fit or _hung_up(connection):
                connection.close()
                return True
            signal.pthread_sigmask(signal.SIG_BLOCK, ANSWERED_BY_A_WORKER)  # until the child answers them itself
            pid = os.fork()
            if pid == 0:
                self._become(request, descriptors, connection)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED_BY_A_WORKER)
            self._children[pid] = connection
            with contextlib.suppress(OSError):  # the launcher died: serve() notices it by its connection
                connection.sendall(pid.to_bytes(8, "big"))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _become(self, request: dict[str, Any], descriptors: list[int], connection: socket.socket) -> None:
        """Run the requested worker, in the child. Never returns."""
        code = 1
        try:
            os.setpgid(0, 0)  # Ray kills the whole process group of a dead worker
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED_BY_A_WORKER)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            self._channel.close()
            for descriptor in (*self._wakeup, *self._raylet):
                os.close(descriptor)
            for other in self._children.values():
                other.close()
            connection.settimeout(None)
            threading.Thread(target=_die_with, args=(connection,), daemon=True, name="launcher").start()
            code = code_of(lambda: _run(request))
        finally:  # after any error too: a child must never continue as a second forker
            os._exit(code & 0xFF)


def _hung_up(connection: socket.socket) -> bool:
    """Return whether the launcher has hung up: it sends nothing after its request, so readable means closed."""
    return bool(readable([connection.fileno()], 0))


def _run(request: dict[str, Any]) -> int:
    """Run the script as the interpreter would."""
    import numpy as np

    script, *arguments = request["arguments"]
    os.environ.clear()
    os.environ.update(request["environment"], **{MARK: "1"})
    os.chdir(request["folder"])
    os.umask(request["umask"])
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"], encoding="ascii")
    np.random.seed()  # otherwise all workers draw the same numbers; Python reseeds `random` in a fork itself
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    return 0


def _die_with(connection: socket.socket) -> None:
    """Kill this process when the launcher is killed: the launcher is the process that Ray knows."""
    with contextlib.suppress(OSError):
        while connection.recv(64):
            pass
    _kill(os.getpid())


def _in_a_fork(draw: Callable[[], str]) -> str:
    """Return the result of `draw` in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, draw().encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="ascii") as stream:  # noqa: PTH123 - a descriptor
        drawn = stream.read()
    os.waitpid(pid, 0)
    return drawn


def receive(channel: socket.socket, num_descriptors: int) -> tuple[dict[str, Any], list[int]]:
    """Return a request and open files from `launcher.send`; ValueError or OSError if they are incomplete."""
    header, descriptors, _, _ = socket.recv_fds(channel, 8, num_descriptors)
    try:
        length, content = int.from_bytes(header, "big"), b""
        while len(content) < length:
            part = channel.recv(min(65536, length - len(content)))
            if not part:
                raise ValueError("the sender hung up")
            content += part
        if len(descriptors) != num_descriptors:
            raise ValueError("files are missing")
        return json.loads(content), descriptors
    except (OSError, ValueError):
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
