"""Detection of Ray's death, before Ray exits this process: 13 s after the raylet's death, or 60 s after the GCS's."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ftexp.cluster import ray_private
from ftexp.cluster.hot_start.launcher import readable
from ftexp.errors import RayLostError

_LOOK_EVERY_S = 0.5
_PROBE_EVERY_S = 5.0
_GCS_SILENT_S = 45.0  # a GCS that is restarted elsewhere may come back; Ray allows 60 s


def end_workers(pids: list[int]) -> None:
    """Kill a dead Ray's train workers on this machine: they outlive it by ten seconds, and would continue training."""
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or this system has no /proc
            if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():  # not another process that has reused the id
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def ending_with(lost: Callable[[], str | None]) -> Iterator[None]:
    """Exit this process with a one-line message if Ray dies in this block: for commands that only read."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_EVERY_S):
            if (reason := lost()) is not None:
                print(f"ftexp: {reason}: run the same command again", file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(RayLostError.exit_code)  # code that waits in Ray can't be interrupted

    threading.Thread(target=watch, daemon=True, name="ray-watch").start()
    try:
        yield
    finally:
        done.set()


class OwnRay:
    """Watch over a Ray that this process has started, by its vital processes."""

    def __init__(self) -> None:
        self._processes = ray_private.started_processes()
        self._logs = ray_private.logs_dir()

    def lost(self) -> str | None:
        """Return which vital process has ended and how, and kill the others; None while all run."""
        for name, process in self._processes.items():
            if (code := process.poll()) is not None:
                ray_private.kill_started()
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                return f"Ray's {name} process {how} (its logs: {self._logs})"
        return None


class JoinedRay:
    """Watch over a Ray that was joined: this machine's raylet by an open connection, the GCS by regular probes."""

    def __init__(self, raylet_socket: str, gcs_address: str) -> None:
        self._gcs_address = gcs_address
        self._silent_since: float | None = None
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._raylet: socket.socket | None = None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(raylet_socket)
            self._raylet = connection
        except OSError:  # in another container than the raylet: Ray exits this process then, as without this watch
            connection.close()
        threading.Thread(target=self._probe_until_closed, daemon=True, name="gcs-probe").start()

    def lost(self) -> str | None:
        """Return which part of Ray has died; None while Ray runs."""
        with self._lock:  # a closed descriptor's number is reused
            if self._raylet is not None and readable([self._raylet.fileno()], 0):  # the raylet never sends data
                return "the raylet of this machine, a process of the Ray that was joined, has died"
        since = self._silent_since
        if since is not None and not self._closed.is_set() and time.monotonic() - since > _GCS_SILENT_S:
            return f"Ray's GCS at {self._gcs_address} has not answered for {_GCS_SILENT_S:.0f} s"
        return None

    def probe(self) -> None:
        """Connect to the GCS, and note whether it answers."""
        host, _, port = self._gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_EVERY_S).close()
            self._silent_since = None
        except OSError:
            self._silent_since = self._silent_since or time.monotonic()

    def close(self) -> None:
        """Stop watching: `lost` returns None from now on."""
        self._closed.set()
        with self._lock:
            if self._raylet is not None:
                self._raylet.close()
                self._raylet = None

    def _probe_until_closed(self) -> None:
        self.probe()
        while not self._closed.wait(_PROBE_EVERY_S):
            self.probe()
