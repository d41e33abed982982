"""Checks of this machine before Ray starts. If a directory is unsuitable, another is used where that is safe.

Ray stores sockets and logs under RAY_TMPDIR, else TMPDIR, else /tmp, and a token in the home directory. Imports neither
torch nor Ray.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ftexp.config.schema import Config
from ftexp.errors import ConfigError

_MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103  # maximum length of a Unix socket's path
# length of Ray's longest socket path below the directory, with the largest process id
_BELOW = len("/ray/session_2026-11-26_13-50-07_432371_4194304/sockets/plasma_store")


def prepare_machine() -> None:
    """Choose directories that Ray and torch can write to; raise ConfigError, naming what to set, if there are none."""
    if os.environ.get("TMPDIR") == "":  # Ray would use it as a relative path
        del os.environ["TMPDIR"]
    base, problem = ray_problem(os.environ)
    if problem is not None:
        if "RAY_TMPDIR" in os.environ:
            raise ConfigError(f"RAY_TMPDIR={base}: {problem}. Set RAY_TMPDIR to a short directory that you can write")
        base = os.environ["RAY_TMPDIR"] = _private(problem)
    Path(base).mkdir(parents=True, exist_ok=True)
    if not _writable(Path.home() / ".ray"):
        token = Path(_private("the home directory is not writable")) / "auth_token"
        if not token.exists():
            token.write_text(secrets.token_hex(32))
            token.chmod(0o600)
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token))
    if not _has_name():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{_private('this user has no name')}/inductor")


def ray_problem(environment: Mapping[str, str]) -> tuple[str, str | None]:
    """Return (directory for Ray's files, reason why Ray can't use it, or None if it can)."""
    base = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    return base, _unfit(base)


def check_compiler(config: Config) -> Iterator[str]:
    """Yield what train.compile needs and this machine lacks, if the workers run on it."""
    if config.train.compiled == "none" or config.scaling.address is not None:
        return
    chosen = os.environ.get("CXX")
    if shutil.which((chosen or "g++").split()[0]) is None:
        found = "there is no g++" if chosen is None else f"CXX={chosen} is not a program on this machine"
        given = f"train.compile={config.train.compiled}"
        yield f"{given} needs a C++ compiler, but {found}: install g++, set CXX to another, or set train.compile=none"


def _unfit(base: str) -> str | None:
    """Return why Ray can't store its files under `base`; None if it can."""
    if len(os.fsencode(base)) + _BELOW > _MAX_PATH_BYTES:
        return f"{base} is too long for a socket's path by {len(os.fsencode(base)) + _BELOW - _MAX_PATH_BYTES} bytes"
    return None if _writable(Path(base) / "ray") else f"{base}/ray is not writable by this user"


def _writable(directory: Path) -> bool:
    """Return whether the directory is writable or, if it doesn't exist, can be created."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _private(problem: str) -> str:
    """Return a directory with a short path that only this user can access.

    Raises ConfigError, which includes `problem`, if it can't be created.
    """
    directory = Path(f"/tmp/ftexp-{os.getuid()}")
    advice = "set RAY_TMPDIR and HOME to directories that you can write"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise ConfigError(f"{problem}, and neither can {directory} ({error}): {advice}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{problem}, and {directory} is not this user's alone: {advice}")
    return str(directory)


def _has_name() -> bool:
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return False
    return True


def num_local_gpus() -> int:
    """Return the number of visible NVIDIA GPUs on this machine, by nvidia-smi: torch isn't imported yet."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return min(found, len(visible.split(","))) if visible else found


def usable_cpus() -> int:
    """Return the number of cores that this process may run on; on macOS, all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
