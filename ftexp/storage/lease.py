"""Lease: one driver at a time on a run directory, by a claim that a crash can't leave behind.

On a local file system the claim is a kernel lock (flock), which ends with the process. On an object store, and on a
file system without locks, it is a file that its owner rewrites every few seconds. A process that finds such a file
watches it for longer than that: if it doesn't change, its owner is dead. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ftexp.errors import RunInUseError
from ftexp.storage.directory import Storage

LOCK_FILE, LEASE_FILE = ".lock", "lease.json"
_BEAT_S = 5.0
_WATCH_S = 3 * _BEAT_S  # an owner that failed to write two beats is still alive
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def unused_name() -> str:
    """Return a name for a run, sweep or drill without one; invocations in the same second get different names."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"


class Lease:
    """The claim of this process on a run directory. Acquire it with `take`, return it with `release`."""

    def __init__(
        self, storage: Storage, say: Callable[[str], None], beat_s: float, watch_s: float, key: str = "run.name"
    ) -> None:
        self._storage, self._say = storage, say
        self._beat_s, self._watch_s = beat_s, watch_s
        self._token = secrets.token_hex(8)
        self._lock: int | None = None  # descriptor
        self._beats = 0
        self._key = key
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost: str | None = None  # process that took it over, since this one seemed dead

    @classmethod
    def take(
        cls,
        storage: Storage,
        say: Callable[[str], None] = print,
        beat_s: float = _BEAT_S,
        watch_s: float = _WATCH_S,
        key: str = "run.name",
    ) -> Lease:
        """Claim the directory; RunInUseError, naming the owner, if a living process has it.

        key: config key that chooses another directory; the message names it.
        """
        lease = cls(storage, say, beat_s, watch_s, key)
        if storage.local_path is None or not lease._take_lock():
            lease._take_file()
        return lease

    def release(self) -> None:
        """Release the claim; does nothing if it was lost."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            try:
                if self.lost is None:
                    self._storage.delete_file(LEASE_FILE)
            except OSError:  # the store doesn't answer; the next process watches the file instead
                pass

    def _take_lock(self) -> bool:
        """Take the kernel lock; return False if the file system has none. RunInUseError if another process holds it."""
        import fcntl

        path = self._storage.local_path
        assert path is not None
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 4096).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise RunInUseError(self._in_use(owner)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return False
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _myself().encode(), 0)
        self._lock = descriptor
        return True

    def _take_file(self) -> None:
        found = self._read()
        if found is not None:
            self._say(f"waiting {self._watch_s:.0f} s at most: is {found['owner']}, which had this run, still alive?")
            end = time.monotonic() + self._watch_s
            while time.monotonic() < end:
                time.sleep(min(1.0, self._watch_s / 10))
                now = self._read()
                if now is None:  # its owner has just finished
                    break
                if now != found:
                    raise RunInUseError(self._in_use(now["owner"]))
        self._write()
        if (now := self._read()) is None or now["token"] != self._token:  # if two took it at once, the last write wins
            raise RunInUseError(self._in_use(now["owner"] if now else "another process"))
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                now = self._read()
                if now is not None and now["token"] != self._token:
                    self.lost = str(now["owner"])
                    return
                self._write()
            except OSError:  # an outage: a watching process can't read the file either
                continue

    def _write(self) -> None:
        self._beats += 1
        content = {"owner": _myself(), "token": self._token, "beats": self._beats}
        self._storage.write_bytes(LEASE_FILE, json.dumps(content).encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(self._storage.read_bytes(LEASE_FILE))
        except (FileNotFoundError, ValueError):
            return None
        return content

    def _in_use(self, owner: str) -> str:
        return (
            f"{self._storage.uri} is in use by {owner}: wait for it, stop it, or choose another {self._key}. "
            "Nothing was changed"
        )


def remove_unused(storage: Storage) -> None:
    """Remove a local directory that contains only a released claim. No other process may know its name."""
    if (path := storage.local_path) is None:
        return
    with contextlib.suppress(OSError):  # in use, or the disk fails: the directory stays
        if [entry.name for entry in path.iterdir()] == [LOCK_FILE]:
            (path / LOCK_FILE).unlink()
            path.rmdir()


def is_held(storage: Storage, watch_s: float = _WATCH_S) -> bool:
    """Return whether a living process has claimed the directory.

    Without kernel locks, this takes up to `watch_s`.
    """
    if (path := storage.local_path) is not None and (path / LOCK_FILE).exists() and _is_locked(str(path / LOCK_FILE)):
        return True
    watched = Lease(storage, print, _BEAT_S, watch_s)
    if (found := watched._read()) is None:
        return False
    end = time.monotonic() + watch_s
    while (now := watched._read()) == found and time.monotonic() < end:
        time.sleep(min(1.0, watch_s / 10))
    return now is not None and now != found


def _is_locked(path: str) -> bool:
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks here: the file decides
        return False
    finally:
        os.close(descriptor)
    return False


def _myself() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
