"""The driver's side: one preloaded process for the Ray that it starts, which ends with it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ftexp.config import ScalingConfig

_LAUNCHER = Path(__file__).with_name("launcher.py")
_PRELOADER = Path(__file__).with_name("preloader.py")
_FORK_WITHIN_S = 60.0  # the source may still be importing


class HotStart:
    """A preloaded process on this machine, or none if `scaling.hot_start` or the platform doesn't allow it.

    source: socket of a preloaded process without Ray. One that has Ray serves the workers of one job; with a source,
    each job gets one for the import of Ray alone.
    without_ray: be such a source.
    """

    def __init__(
        self, config: ScalingConfig, num_threads: int, source: str | None = None, without_ray: bool = False
    ) -> None:
        self._folder: str | None = None
        allowed = source is not None or without_ray or config.address is None
        if config.hot_start == "off" or not allowed or not supported():
            return
        self._folder = tempfile.mkdtemp(prefix="ftexp-")  # 0700: its socket is this user's alone
        start = (
            [*_fork_words(source), str(_PRELOADER)] if source else [sys.executable, "-m", "ftexp.hot_start.preloader"]
        )
        self._process = subprocess.Popen(
            [*start, self._socket, *(["without_ray"] if without_ray else [])],
            stdin=subprocess.PIPE,
            # threads are read when the libraries are loaded, so before the fork
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads)},
        )
        if source:
            self._wait_for_socket()

    def _wait_for_socket(self) -> None:
        """A fork is there at once: who asks before it listens would start plainly."""
        end = time.monotonic() + _FORK_WITHIN_S
        while not Path(self._socket).exists() and self._process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    @property
    def socket(self) -> str | None:
        """Where the preloaded process is asked; None if there is none."""
        return self._socket if self._folder is not None else None

    def python(self) -> list[str]:
        """The interpreter's command line, up to the script: the preloaded process's, if there is one."""
        return _fork_words(self._socket) if self._folder is not None else [sys.executable]

    def runtime_env(self) -> dict[str, Any]:
        """What ray.init is given, so that workers begin as forks."""
        return {"py_executable": shlex.join(self.python())} if self._folder is not None else {}

    def stop(self) -> None:
        """End the preloaded process; workers that run go on without it."""
        if self._folder is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def _socket(self) -> str:
        return f"{self._folder}/socket"


def _fork_words(socket: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(_LAUNCHER), socket]


def supported() -> bool:
    """Whether this platform has what forking workers needs: Linux, in short."""
    return all(hasattr(os, name) for name in ("fork", "pidfd_open", "pipe2"))
