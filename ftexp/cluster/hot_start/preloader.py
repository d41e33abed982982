"""The process that has everything imported but Ray, from which a forker is forked for each raylet.

Run as `python -m ftexp.cluster.hot_start.preloader <socket> <descriptor>` by the driver that starts a Ray of its own,
and ends when its standard input closes: the driver is gone. On a node of a Ray that was joined, a launcher runs it,
with the raylet's process id as a last argument, and it ends with that raylet. The socket listens already, as the
descriptor says. Workers that run continue without it.

Neither it nor a forker ever starts a thread or touches a GPU, so that a fork is a whole process.
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

# what a worker imports; a name that isn't there costs the worker what it would have cost without
BEFORE_THE_CLUSTER = (
    *("numpy", "pandas", "pyarrow", "pyarrow.fs", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset"),
    *("torch", "torch.distributed", "torch.nn.parallel", "torchvision", "timm", "timm.optim", "timm.scheduler"),
    "omegaconf",
)
NOT_USED = ("wandb",)  # by timm, for a table of its own
NO_JOB = "ffffffff"  # Ray's JobID.nil()
_READ_LATER = ("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",)  # set for some workers of a job, read when it is wanted


def main() -> None:
    """Import, then serve until what it belongs to has ended."""
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
        with contextlib.suppress(OSError):  # the driver removes it itself
            for name in (Path(path).name, LOCK):
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()
    os._exit(0)  # taking the modules down would take a second or two, for which the driver waits


class Preloader:
    """Hands each launcher to the forker of its raylet, which it forks when it meets that for the first time.

    Where a job sets variables of Ray's own for its workers, these have another.
    """

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self._listener, self._owner = listener, owner
        self._path = os.environ.get("PYTHONPATH")  # what was imported came from there
        self._forkers: dict[frozenset[tuple[str, str]], socket.socket] = {}  # by what Ray reads

    def serve(self) -> None:
        """Until the owner, a pipe or another process, has ended."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forkers that have ended want no further attention
        while True:
            keys = {channel.fileno(): key for key, channel in self._forkers.items()}
            ready = readable([self._owner, self._listener.fileno(), *keys])
            if self._owner in ready and (self._owner != 0 or not os.read(0, 4096)):
                return
            for descriptor in ready:
                if descriptor in keys:  # a forker never says a word: it has ended
                    self._forkers.pop(keys[descriptor]).close()
            if self._listener.fileno() in ready:
                self._accept()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(5)
        descriptors: list[int] = []
        # the launcher died, or isn't one; or its forker has just ended. It starts plainly when the connection closes
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
                    for descriptor in not_its_own:  # else the output of a worker that has ended would stay open
                        os.close(descriptor)
                    Forker(theirs, {**environment, **read}).serve()
                finally:  # after any error too: the fork must never continue as a second preloader
                    os._exit(0)
            theirs.close()
            self._forkers[key] = ours
        return self._forkers[key]


def read_by_ray(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that Ray reads from a worker's environment at import, without a job.

    The worker will get its job with its first task, as workers do that raylet starts in advance.
    """
    read = {name: value for name, value in environment.items() if name.startswith("RAY_") and name not in _READ_LATER}
    return {**read, "RAY_JOB_ID": NO_JOB} if "RAY_JOB_ID" in read else read


if __name__ == "__main__":
    main()
