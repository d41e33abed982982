"""Append-only files of JSON lines, which survive the death of their writer."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftexp.storage.directory import Storage


class AppendLog:
    """A file to which lines are appended. An object store can't append, so there the whole file is written again.

    A line that can't be written is kept, and retried with the next one: a full disk loses none. One thread
    writes; any may call `lines`.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._lines: list[str] = []  # local: lines not yet written; object store: all lines
        self._file: Any = None
        self._num_there: int | None = None  # lines in the copy on the object store; None: no copy yet
        self._moving = threading.Lock()  # between _lines and the file: a reader would find lines twice, or not at all
        if (path := storage.local_path) is not None:
            path.mkdir(parents=True, exist_ok=True)
            _end_truncated_line(path / name)
            self._file = (path / name).open("ab", buffering=0)  # closed by close()
        elif storage.exists(name):
            self._lines = storage.read_bytes(name).decode().splitlines()
            self._num_there = len(self._lines)

    def append(self, line: str) -> None:
        """Add one line; on a local disk it has left this process when the call returns, unless the disk is full."""
        self._lines.append(line)
        if self._file is not None:
            with contextlib.suppress(OSError):  # flush() reports it
                self.flush()

    def flush(self) -> None:
        """Write the lines not yet written, or update an object store's copy; OSError if that fails."""
        if self._file is None and self._num_there == len(self._lines):
            return
        content = "".join(f"{line}\n" for line in self._lines).encode()
        if self._file is None:
            self._storage.write_bytes(self._name, content)
            self._num_there = len(self._lines)
            return
        with self._moving:
            size = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(content) != len(content):
                    raise OSError(f"{self._name} was written only partly: the disk is full")
            except OSError:
                self._file.truncate(size)  # no incomplete line in the middle of the file
                raise
            self._lines.clear()

    def sync(self) -> None:
        """Flush; on a local disk the lines then survive a power cut."""
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def rewrite(self, lines: list[str]) -> None:
        """Replace all lines; OSError if that fails, and the old lines stay."""
        if self._file is None:
            before, self._lines = self._lines, list(lines)
            try:
                self.flush()
            except OSError:
                self._lines = before
                raise
            return
        path = self._storage.local_path
        assert path is not None, "it has a file"
        with self._moving:
            self._storage.write_bytes(self._name, "".join(f"{line}\n" for line in lines).encode())
            self._file.close()
            self._file = (path / self._name).open("ab", buffering=0)
            self._lines.clear()

    def lines(self) -> list[str]:
        """Return every line so far, also those that couldn't be written yet."""
        if self._file is None:
            return list(self._lines)
        path = self._storage.local_path
        assert path is not None, "it has a file"
        with self._moving:
            return [*(path / self._name).read_text(encoding="utf-8").splitlines(), *self._lines]

    def close(self) -> None:
        """Flush, and release the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON, in one line unless `indent` is given; NaN and infinity become null."""
    return json.dumps(finite(value), indent=indent)


def finite(value: Any) -> Any:
    """Return a copy in which NaN and infinity are None: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


def parse_lines(lines: Iterable[str]) -> list[Any]:
    """Return the parsed lines, without one that a kill has truncated."""
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):  # incomplete
            entries.append(json.loads(line))
    return entries


def read_lines(storage: Storage, name: str) -> list[Any]:
    """Return the parsed lines of an AppendLog, without one that a kill has truncated.

    FileNotFoundError if there is no such file.
    """
    return parse_lines(storage.read_bytes(name).decode().splitlines())


def _end_truncated_line(path: Path) -> None:
    """Remove a last line that a killed writer left incomplete."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
