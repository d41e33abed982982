"""The driver's side: one preloaded process for the Ray that it starts, which ends with it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ftexp.config import ScalingConfig

_LAUNCHER = Path(__file__).with_name("launcher.py")


class HotStart:
    """A preloaded process on this machine, or none if `scaling.hot_start` or the platform doesn't allow it."""

    def __init__(self, config: ScalingConfig, num_threads: int) -> None:
        self._folder: str | None = None
        if config.hot_start == "off" or config.address is not None or not supported():
            return
        self._folder = tempfile.mkdtemp(prefix="ftexp-")  # 0700: its socket is this user's alone
        threads = str(num_threads)  # read when the libraries are loaded, so before the fork
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ftexp.hot_start.preloader", self._socket],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )

    def runtime_env(self) -> dict[str, Any]:
        """What ray.init is given, so that workers begin as forks."""
        if self._folder is None:
            return {}
        words = [sys.executable, "-S", "-E", str(_LAUNCHER), self._socket]
        return {"py_executable": shlex.join(words)}

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


def supported() -> bool:
    """Whether this platform has what forking workers needs: Linux, in short."""
    return all(hasattr(os, name) for name in ("fork", "pidfd_open", "pipe2"))
