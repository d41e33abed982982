"""A folder at a local path or at any URI that pyarrow.fs opens, with the few operations ftexp rests on.

Local writes are atomic and on disk when they return: temporary name, fsync, rename, fsync of the folder.
Object stores make a single object visible whole, so there a plain write does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ftexp.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_TEMPORARY = ".tmp-"  # prefix of a name that is being written; never a result


def open_uri(uri: str, key: str) -> tuple[FileSystem, str]:
    """Return the pyarrow file system of a path or URI, and the path in it. `key` names it in errors."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_remote(uri):
        return LocalFileSystem(), _local_path(uri)
    try:
        filesystem, path = FileSystem.from_uri(uri)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError or ImportError, by scheme
        raise ConfigError(f"{key}={uri} can't be opened: {error}. Give a folder, or a URI of pyarrow.fs") from error
    return filesystem, path


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store or the like, not a folder of this machine."""
    return bool(re.match(r"^\w[\w+.-]*://", uri)) and not uri.startswith("file://")


def _local_path(uri: str) -> str:
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    return str(Path(path).expanduser().absolute())


@dataclass(frozen=True)
class Storage:
    """A folder. Names are relative to it, with forward slashes; a missing folder is made on first write."""

    uri: str  # absolute path, or URI

    @classmethod
    def at(cls, base: str, *names: str) -> Storage:
        """The folder `names` under `base`; a local path is made absolute, since workers change directory."""
        if not is_remote(base):
            base = _local_path(base)
        return cls(base.rstrip("/") or "/").child(*names)

    def child(self, *names: str) -> Storage:
        """A folder inside this one."""
        # the options of a URI (s3://bucket/prefix?region=...) stay at its end
        base, mark, options = self.uri.partition("?") if is_remote(self.uri) else (self.uri, "", "")
        return Storage("/".join([base, *names]) + mark + options)

    @property
    def local_path(self) -> Path | None:
        """The folder as a Path, or None where it isn't on a local file system."""
        return None if is_remote(self.uri) else Path(self.uri)

    def open(self) -> tuple[FileSystem, str]:
        """The pyarrow file system that holds the folder, and its path there."""
        return open_uri(self.uri, "run.storage")

    def read_bytes(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none, StorageError if it can't be read."""
        if (path := self.local_path) is not None:
            return (path / name).read_bytes()
        filesystem, root = self.open()
        with filesystem.open_input_file(f"{root}/{name}") as file:
            return bytes(file.read())

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Write a file so that it is there whole, or not at all, whatever dies in between; OSError on failure."""
        if (path := self.local_path) is None:
            filesystem, root = self.open()
            with filesystem.open_output_stream(f"{root}/{name}") as stream:
                stream.write(content)
            return
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_TEMPORARY}{target.name}")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)

    def publish(self, files: dict[str, bytes | memoryview], last: str) -> None:
        """Write a folder of files that becomes visible only when complete. `last` is written after the others.

        Local: under a temporary name, renamed. Object store: `last` is the one that readers look for.
        """
        ordered = [name for name in files if name != last] + [last]
        path = self.local_path
        if path is None:
            for name in ordered:
                self.write_bytes(name, files[name])
            return
        temporary = path.with_name(f"{_TEMPORARY}{path.name}")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died here before
        for name in ordered:
            Storage(str(temporary)).write_bytes(name, files[name])
        temporary.rename(path)
        _sync_folder(path.parent)

    def list_folders(self) -> list[str]:
        """Names of the folders directly inside, sorted, without half-written ones; empty if this isn't there."""
        from pyarrow.fs import FileSelector, FileType

        filesystem, root = self.open()
        found = filesystem.get_file_info(FileSelector(root, allow_not_found=True))
        return sorted(
            info.base_name
            for info in found
            if info.type == FileType.Directory and not info.base_name.startswith(_TEMPORARY)
        )

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        from pyarrow.fs import FileType

        filesystem, root = self.open()
        return bool(filesystem.get_file_info(f"{root}/{name}".rstrip("/")).type != FileType.NotFound)

    def delete(self) -> None:
        """Remove this folder and all it holds; nothing happens if it isn't there."""
        if (path := self.local_path) is not None:
            shutil.rmtree(path, ignore_errors=True)
        elif self.exists():
            filesystem, root = self.open()
            filesystem.delete_dir(root)

    def delete_file(self, name: str) -> None:
        """Remove a file; nothing happens if it isn't there."""
        if (path := self.local_path) is not None:
            (path / name).unlink(missing_ok=True)
        elif self.exists(name):
            filesystem, root = self.open()
            filesystem.delete_file(f"{root}/{name}")

    def require_writable(self) -> None:
        """Raise StorageError, naming the key and the reason, if nothing can be written here."""
        try:
            self.write_bytes(".writable", b"")
            self.delete_file(".writable")
        except OSError as error:
            raise StorageError(
                f"run.storage: {self.uri} can't be written: {error}. Give another run.storage"
            ) from error


class AppendLog:
    """Lines added to the end of a file. On an object store, which can't append, the whole is written again.

    A line that can't be written waits, and is tried again with the next one: a full disk loses none.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._lines: list[str] = []  # local: those that wait; object store: all
        self._file: Any = None
        if (path := storage.local_path) is not None:
            path.mkdir(parents=True, exist_ok=True)
            _end_torn_line(path / name)
            self._file = (path / name).open("ab", buffering=0)  # closed by close()
        elif storage.exists(name):
            self._lines = storage.read_bytes(name).decode().splitlines()

    def append(self, line: str) -> None:
        """Add one line; on a local disk it has left this process when the call returns, unless the disk is full."""
        self._lines.append(line)
        if self._file is not None:
            with contextlib.suppress(OSError):  # flush() tells
                self.flush()

    def flush(self) -> None:
        """Write what waits, or bring an object store's copy up to date; OSError if that can't be done."""
        content = "".join(f"{line}\n" for line in self._lines).encode()
        if self._file is None:
            self._storage.write_bytes(self._name, content)
            return
        size = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(content) != len(content):
                raise OSError(f"{self._name} was written in part only: the disk is full")
        except OSError:
            self._file.truncate(size)  # no torn line in the middle of the file
            raise
        self._lines.clear()

    def close(self) -> None:
        """Flush, and release the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def _end_torn_line(path: Path) -> None:
    """Cut a last line that a killed writer left without its end: it is no JSON."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
