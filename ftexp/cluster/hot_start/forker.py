"""Forks the workers of one raylet: a fork of the preloaded process that has imported Ray as well.

Ray reads its raylet, its settings and the cluster's token when it is imported, so the first worker brings the
environment for that; what belongs to no raylet, as the drivers of a sweep's trials, has a forker as well. Ends when the
preloaded process ends, or when nothing has been asked for in a while.
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
    # what Ray imports within functions while a worker starts, where it would take 0.8 CPU-seconds
    *("pyarrow.json", "pydantic.v1", "ray.tune", "ray.data._internal.execution.streaming_executor"),
    *("ray.data._internal.logical.optimizers", "ray.data._internal.planner.planner"),
)
MORE = "FTEXP_PRELOAD"  # more modules for the workers of this job to import, with commas between
ANSWERED_BY_A_WORKER = (signal.SIGINT, signal.SIGTERM)  # but ignored here
MARK = "FTEXP_HOT_START"  # environment variable that a forked worker has
_IDLE_S = 300.0  # without a worker, before it ends: a job waits for less between two worker groups


def import_all(names: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
    """Import what is there of these.

    without: what they would import if it is installed, and no worker uses.
    """
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]  # None: an ImportError
    with importing_for_good():
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    for name in without:
        del sys.modules[name]


class Forker:
    """Forks a child for each launcher that is handed over, and reports its pid and later its wait status."""

    def __init__(self, channel: socket.socket, environment: dict[str, str]) -> None:
        self._channel = channel
        self._children: dict[int, socket.socket] = {}  # pid -> connection to its launcher
        self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._is_fit = self._import_ray()

    def _import_ray(self) -> bool:
        """Import; whether forks draw ids of their own. If a new Ray breaks that, workers start plainly."""
        from ftexp.cluster import ray_private

        more = filter(None, os.environ.get(MORE, "").split(","))
        with uncollected():  # Ray as well
            ray_private.import_without_drawing(lambda: import_all((*WITH_THE_CLUSTER, *more)))
        return len({_in_a_fork(ray_private.random_id) for _ in range(2)}) == 2

    def serve(self) -> None:
        """Until the preloaded process ends, or nothing has been asked for in a while."""
        signal.set_wakeup_fd(self._wakeup[1])
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            launchers = {connection.fileno(): pid for pid, connection in self._children.items()}
            watched = [self._channel.fileno(), self._wakeup[0], *launchers]
            ready = readable(watched, None if launchers else _IDLE_S)
            if not ready:
                return
            if self._wakeup[0] in ready:
                os.read(self._wakeup[0], 4096)
                self._reap()
            for descriptor in ready:
                if descriptor in launchers:
                    self._launcher_died(launchers[descriptor])
            if self._channel.fileno() in ready and not self._take():
                return

    def _launcher_died(self, pid: int) -> None:
        """A launcher sends nothing after its request: what can be read is the end."""
        if pid in self._children:
            _kill(pid)

    def _reap(self) -> None:
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                connection = self._children.pop(pid)
                with contextlib.suppress(OSError):  # the launcher went first
                    connection.sendall(status.to_bytes(8, "big"))
                connection.close()

    def _take(self) -> bool:
        """Fork a worker for the next launcher that is handed over; False once there is nobody to hand one over."""
        try:
            request, (asker, *descriptors) = receive(self._channel, 4)
        except (OSError, ValueError):
            return False
        connection = socket.socket(fileno=asker)
        try:
            # it may have waited too long, and run plainly: a second worker must not start
            if not self._is_fit or _hung_up(connection):
                connection.close()
                return True
            signal.pthread_sigmask(signal.SIG_BLOCK, ANSWERED_BY_A_WORKER)  # until the child answers them itself
            pid = os.fork()
            if pid == 0:
                self._become(request, descriptors, connection)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED_BY_A_WORKER)
            self._children[pid] = connection
            with contextlib.suppress(OSError):  # the launcher died: serve() learns it from what can be read
                connection.sendall(pid.to_bytes(8, "big"))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _become(self, request: dict[str, Any], descriptors: list[int], connection: socket.socket) -> None:
        """In the child: be the worker that was asked for. Never returns."""
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
            for descriptor in self._wakeup:
                os.close(descriptor)
            for other in self._children.values():
                other.close()
            connection.settimeout(None)
            threading.Thread(target=_die_with, args=(connection,), daemon=True, name="launcher").start()
            code = code_of(lambda: _run(request))
        finally:  # whatever happens, a child never continues as a second forker
            os._exit(code & 0xFF)


def _hung_up(connection: socket.socket) -> bool:
    """A launcher sends nothing after its request: what can be read is the end."""
    return bool(readable([connection.fileno()], 0))


def _run(request: dict[str, Any]) -> int:
    """Run the script as the interpreter would have."""
    import numpy as np

    script, *arguments = request["arguments"]
    os.environ.clear()
    os.environ.update(request["environment"], **{MARK: "1"})
    os.chdir(request["folder"])
    os.umask(request["umask"])
    with contextlib.suppress(OSError):  # a system that doesn't know it
        Path("/proc/self/oom_score_adj").write_text(request["oom_score_adj"], encoding="ascii")
    np.random.seed()  # or every worker would draw the same; Python sees to its own
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    return 0


def _die_with(connection: socket.socket) -> None:
    """The launcher is what Ray knows: when it is killed, this goes too."""
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
    """Return a request and open files from `launcher.send`. ValueError or OSError if it is not complete."""
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
