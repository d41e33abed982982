"""The preloaded process: has imported everything except Ray; a forker is forked from it for each raylet.

A driver that starts its own Ray runs it as `python -m ftexp.cluster.hot_start.preloader <socket> <descriptor>`, and it
ends when its standard input closes, since the driver is gone then. On a node of a Ray that was joined, a launcher runs
it with the raylet's process id as a last argument, and it ends with that raylet. <descriptor> is the listening socket.
Running workers continue without it.

Neither it nor a forker ever starts a thread or touches a GPU, because forks would not have these.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

from ftexp.cluster.hot_start.forker import ANSWERED_BY_A_WORKER, Forker, import_all, receive
from ftexp.cluster.hot_start.launcher import LOCK, readable, send

# modules that a worker imports; the worker itself imports what is missing here
BEFORE_THE_CLUSTER = (
    *("numpy", "pandas", "pyarrow", "pyarrow.fs", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset"),
    *("torch", "torch.distributed", "torch.nn.parallel", "torchvision", "timm", "timm.optim", "timm.scheduler"),
    "omegaconf",
)
NOT_USED = ("wandb",)  # timm imports it for a table of its own
NO_JOB = "ffffffff"  # Ray's JobID.nil()
_READ_LATER = ("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",)  # set for some workers of a job only; read at use, not at import


def main() -> None:
    """Import, then serve until the driver or raylet has ended."""
    path, descriptor, *raylet = sys.argv[1:]
    for number in ANSWERED_BY_A_WORKER:
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the driver decides
    listener = socket.socket(fileno=int(descriptor))
    listener.set_inheritable(False)
    try:
        owner = os.pidfd_open(int(raylet[0])) if raylet else 0
        import_all(BEFORE_THE_CLUSTER, without=NOT_USED)
        Preloader(listener, owner).serve()
    finally:
        directory = Path(path).parent
        with contextlib.suppress(OSError):  # the driver may remove it too
            for name in (Path(path).name, LOCK):
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()
    os._exit(0)  # unloading the modules would take a second or two, and the driver waits for it


class Preloader:
    """Dispatcher of launchers' requests to the forkers of their raylets, each of which is forked at its first request.

    A job that sets variables of Ray's for its workers has another forker.
    """

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self._listener, self._owner = listener, owner
        self._path = os.environ.get("PYTHONPATH")  # modules were imported with this path
        self._forkers: dict[frozenset[tuple[str, str]], socket.socket] = {}  # by the variables that Ray reads

    def serve(self) -> None:
        """Serve until the owner has ended: standard input has closed, or the raylet has exited."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended forkers
        while True:
            keys = {channel.fileno(): key for key, channel in self._forkers.items()}
            ready = readable([self._owner, self._listener.fileno(), *keys])
            if self._owner in ready and (self._owner != 0 or not os.read(0, 4096)):
                return
            for descriptor in ready:
                if descriptor in keys:  # a forker never sends anything: it has ended
                    self._forkers.pop(keys[descriptor]).close()
            if self._listener.fileno() in ready:
                self._accept()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(5)
        descriptors: list[int] = []
        # the launcher died, or isn't one, or its forker has just ended; when the connection closes, the launcher
        # becomes a plain interpreter
        with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            request, descriptors = receive(connection, 3)
            environment = request["environment"]
            if environment.get("PYTHONPATH") == self._path:
                handed_over = [connection.fileno(), *descriptors]
                send(self._forker(environment, handed_over), json.dumps(request).encode(), handed_over)
        for descriptor in descriptors:
            os.close(descriptor)

    def _forker(self, environment: dict[str, str], not_its_own: list[int]) -> socket.socket:
        read = read_by_ray(environment)
        key = frozenset(read.items()) if "RAY_RAYLET_PID" in read else frozenset()
        if key not in self._forkers:
            ours, theirs = socket.socketpair()
            if os.fork() == 0:
                try:
                    for other in (ours, self._listener, *self._forkers.values()):
                        other.close()
                    for descriptor in not_its_own:  # otherwise a worker's output would stay open after its end
                        os.close(descriptor)
                    Forker(theirs, {**environment, **read}).serve()
                finally:  # after any error too: the fork must never continue as a second preloader
                    os._exit(0)
            theirs.close()
            self._forkers[key] = ours
        return self._forkers[key]


def read_by_ray(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that Ray reads from a worker's environment at import, with the job's id set to none.

    A worker gets its job with its first task, as workers that raylet starts in advance do.
    """
    read = {name: value for name, value in environment.items() if name.startswith("RAY_") and name not in _READ_LATER}
    return {**read, "RAY_JOB_ID": NO_JOB} if "RAY_JOB_ID" in read else read


if __name__ == "__main__":
    main()
