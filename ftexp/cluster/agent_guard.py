"""Guard of one of Ray's agents: kills raylet when the agent dies, and the agent when raylet dies.

When an agent dies, a raylet of Ray's own leaves the cluster and ends. Ray then recovers the driver's objects, which
needs the object store of that raylet, and exits the driver without a message, since the store is gone. The driver
notices a raylet that was killed before Ray does (ray_watch.py). And where raylet and GCS are killed, an agent of Ray's
own waits a minute for the GCS.

Run by path as a child of raylet, as `python -S -E agent_guard.py <command of the agent>`, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> None:
    """Start the agent, and exit with 1 when it or raylet has ended."""
    parent = os.getppid()
    raylet, agent = os.pidfd_open(parent), os.pidfd_open(start(sys.argv[1:]))
    if os.getppid() != parent:  # it has ended, and its id may be another's
        os._exit(1)
    ended = select.poll()
    for process in (raylet, agent):
        ended.register(process, select.POLLIN)
    if agent in [process for process, _ in ended.poll()]:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(raylet, signal.SIGKILL)
    os._exit(1)


def start(command: list[str]) -> int:
    """Start a process that is killed when this one ends; return its pid."""
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == guard:
                os.execv(command[0], command)
        finally:
            os._exit(1)
    return pid


if __name__ == "__main__":
    main()
