"""The process that has everything imported, and forks workers on request.

Run as `python -m ftexp.hot_start.preloader <socket>`, by the driver that starts a Ray of its own. Ray itself it
imports when the first worker is asked for, in that worker's environment: Ray reads its job, its raylet and the
cluster's token then. So one process serves one job; a sweep, whose trials are jobs, has one that never imports Ray
(`without_ray`), and forks from it one for each trial. When standard input closes, the driver is gone, and this ends;
workers go on without it.

It never starts a thread and never touches a GPU, so that a fork is a whole process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# what a worker imports; a name that isn't there costs the worker what it would have cost without
BEFORE_THE_CLUSTER = (
    *("numpy", "pandas", "pyarrow", "pyarrow.fs", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset"),
    *("torch", "torch.distributed", "torch.nn.parallel", "torchvision", "timm", "timm.optim", "timm.scheduler"),
    *("sklearn.model_selection", "omegaconf"),
)
WITH_THE_CLUSTER = ("ray", "ray.train", "ray.train.torch", "ray.data", "ftexp.loop", "ftexp.trainer")
_ANSWERED_BY_A_WORKER = (signal.SIGINT, signal.SIGTERM)  # but ignored here
_SAME = ("PYTHONPATH", "RAY_JOB_ID", "RAY_RAYLET_PID")
MARK = "FTEXP_HOT_START"  # in a forked worker's environment


def main() -> None:
    """Import, then fork on request until standard input closes."""
    for number in _ANSWERED_BY_A_WORKER:
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the driver decides
    listener = _listen(sys.argv[1])
    try:
        _import(BEFORE_THE_CLUSTER)
        Preloader(listener, without_ray="without_ray" in sys.argv[2:]).serve()
    finally:
        path = Path(sys.argv[1])
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the driver was killed, or removes it itself
            path.parent.rmdir()
    os._exit(0)  # taking the modules down would take a second or two, for which the driver waits


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # 0600 from the start
    listener.bind(path)
    os.umask(before)
    listener.listen(128)
    return listener


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            continue


class Preloader:
    """Forks a child for each connection, tells its pid, and later its wait status."""

    def __init__(self, listener: socket.socket, without_ray: bool = False) -> None:
        self._listener, self._without_ray = listener, without_ray
        self._children: dict[int, socket.socket] = {}  # pid -> its launcher's connection
        self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._has_ray = False
        self._is_fit = False  # whether forks draw ids of their own; if a new Ray breaks that, workers start plainly

    def serve(self) -> None:
        """Until standard input closes."""
        signal.set_wakeup_fd(self._wakeup[1])
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            launchers = {connection.fileno(): pid for pid, connection in self._children.items()}
            watched = [0, self._listener.fileno(), self._wakeup[0], *launchers]
            readable, _, _ = select.select(watched, [], [])
            if 0 in readable and not os.read(0, 4096):
                return
            if self._wakeup[0] in readable:
                os.read(self._wakeup[0], 4096)
                self._reap()
            for descriptor in readable:
                if descriptor in launchers:
                    self._launcher_died(launchers[descriptor])
            if self._listener.fileno() in readable:
                self._accept()

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

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(5)
        descriptors: list[int] = []
        try:
            request, descriptors = _receive(connection)
            if not self._has_ray and not self._without_ray:
                self._import_ray(request["environment"])
            if not self._may_fork(request["environment"]):
                connection.sendall(bytes(8))
                connection.close()
                return
            if _hung_up(connection):  # it has waited too long and runs plainly: a second worker must not start
                raise ValueError("the launcher hung up")
            signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_A_WORKER)  # until the child answers them itself
            pid = os.fork()
            if pid == 0:
                self._become(request, descriptors, connection)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ANSWERED_BY_A_WORKER)
            self._children[pid] = connection
            with contextlib.suppress(OSError):  # the launcher died: what can be read of it tells serve()
                connection.sendall(pid.to_bytes(8, "big"))
        except (OSError, ValueError, KeyError, TypeError):  # the launcher died, or isn't one
            connection.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _may_fork(self, environment: dict[str, str]) -> bool:
        """Whether a fork would be the process that a plain start is."""
        if self._without_ray:
            return environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH")
        return self._is_fit and _fits(environment)

    def _import_ray(self, environment: dict[str, str]) -> None:
        """Ray reads its job, its raylet and the cluster's token when it is imported: the first worker brings them."""
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
        from ftexp import ray_private

        ray_private.import_without_drawing(lambda: _import(WITH_THE_CLUSTER))
        self._is_fit = len({_in_a_fork(ray_private.random_id) for _ in range(2)}) == 2
        self._has_ray = True

    def _become(self, request: dict[str, Any], descriptors: list[int], connection: socket.socket) -> None:
        """In the child: be the worker that was asked for. Never returns."""
        code = 1
        try:
            os.setpgid(0, 0)  # Ray kills a dead worker's whole process group
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ANSWERED_BY_A_WORKER)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            self._listener.close()
            for descriptor in self._wakeup:
                os.close(descriptor)
            for other in self._children.values():
                other.close()
            connection.settimeout(None)
            if request["arguments"][0] != __file__:  # another of these has no threads, and ends with its driver
                threading.Thread(target=_die_with, args=(connection,), daemon=True, name="launcher").start()
            code = _end(_run, request)
        finally:  # whatever happens, a child never goes on as a second preloaded process
            os._exit(code & 0xFF)


def _end(run: Callable[[dict[str, Any]], int], request: dict[str, Any]) -> int:
    """The exit code of `run`, after what the interpreter does at its end, short of taking the modules down."""
    interrupted = False
    try:
        code = run(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads that aren't daemons, as multiprocessing does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    if interrupted:  # a shell and a launcher tell by this
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def _hung_up(connection: socket.socket) -> bool:
    """A launcher sends nothing after its request: what can be read is the end."""
    return bool(select.select([connection], [], [], 0)[0])


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
    """What `draw` returns in a forked child."""
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


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    length, content = int.from_bytes(header, "big"), b""
    while len(content) < length:
        part = connection.recv(min(65536, length - len(content)))
        if not part:
            raise ValueError("the launcher hung up")
        content += part
    return json.loads(content), descriptors


def _fits(environment: dict[str, str]) -> bool:
    """Whether the worker would import from where this process did."""
    return all(environment.get(name) == os.environ.get(name) for name in _SAME)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
