"""A directory at a local path or at any URI that pyarrow.fs opens, with the few operations that ftexp needs.

Local writes are atomic and on disk when they return: temporary name, fsync, rename, fsync of the directory.
An object store shows an object only when it is complete, so there a plain write is enough.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

from ftexp.errors import ConfigError, StorageError
from ftexp.storage.uri import is_remote

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_TEMPORARY = ".tmp-"  # prefix of a name while it is being written; never a result

_S3_ATTEMPTS = 3  # an endpoint that never answers then costs about 10 s instead of 100 (pyarrow 26)

Writer = Callable[[BinaryIO], object]  # writes a file's content into the given stream


def open_uri(uri: str, key: str) -> tuple[FileSystem, str]:
    """Return the pyarrow file system of a path or URI, and the path in it; ConfigError, naming `key`, if that fails."""
    try:
        return _opened(uri)
    except (ConfigError, OSError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{uri} can't be opened: {error}"
        raise ConfigError(f"{key}={reason}") from error


def _opened(uri: str) -> tuple[FileSystem, str]:
    """Like `open_uri`, but raise OSError if a store doesn't answer: S3 is asked for the bucket's region."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_remote(uri):
        return LocalFileSystem(), _local_path(uri)
    try:
        filesystem, path = FileSystem.from_uri(uri)
        return _less_patient(filesystem), path
    except OSError:
        raise
    except Exception as error:  # pyarrow raises ArrowInvalid or ImportError, by scheme
        raise ConfigError(f"{uri} can't be opened: {error}. Give a directory, or a URI of pyarrow.fs") from error


def absolute(uri: str) -> str:
    """Return a local path as an absolute path; a URI unchanged."""
    return uri if is_remote(uri) else _local_path(uri)


def _less_patient(filesystem: FileSystem) -> FileSystem:
    """Return an S3 file system that gives up on a dead endpoint after seconds, not minutes; callers retry later anyway.

    pyarrow has no URI option for this; the pickled form of a file system has the arguments that it was created with.
    """
    from pyarrow import fs

    if filesystem.type_name != "s3":
        return filesystem
    _, (arguments,) = filesystem.__reduce__()
    return fs.S3FileSystem(**{**arguments, "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS)})


def _local_path(uri: str) -> str:
    path = unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri
    return str(Path(path).expanduser().absolute())


@dataclass(frozen=True)
class Storage:
    """A directory. Names are relative to it, with forward slashes; a missing directory is created at first write."""

    uri: str  # absolute path, or URI

    @classmethod
    def at(cls, base: str, *names: str) -> Storage:
        """Return the directory `names` under `base`; a local path is made absolute, since workers change directory."""
        if not is_remote(base):
            base = _local_path(base)
        return cls(base.rstrip("/") or "/").child(*names)

    def child(self, *names: str) -> Storage:
        """Return a directory inside this one."""
        base, options = self._split()
        return Storage("/".join([base, *names]) + options)

    @property
    def parent(self) -> Storage:
        """The parent directory."""
        base, options = self._split()
        return Storage((base.rpartition("/")[0] or "/") + options)

    @property
    def name(self) -> str:
        """This directory's own name."""
        return self._split()[0].rpartition("/")[2]

    def _split(self) -> tuple[str, str]:
        """Return the path, and the options of a URI (s3://bucket/prefix?region=...), which stay at its end."""
        base, mark, options = self.uri.partition("?") if is_remote(self.uri) else (self.uri, "", "")
        return base, mark + options

    @property
    def local_path(self) -> Path | None:
        """The directory as a Path; None if it isn't on a local file system."""
        return None if is_remote(self.uri) else Path(self.uri)

    def open(self) -> tuple[FileSystem, str]:
        """Return the directory's pyarrow file system, and its path in it.

        ConfigError if the URI is invalid; OSError if the store doesn't answer.
        """
        return _opened(self.uri)

    def read_bytes(self, name: str) -> bytes:
        """Read a file; FileNotFoundError if there is none, another OSError if it can't be read."""
        with self.reading(name) as stream:
            return bytes(stream.read())

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """Open a stream of a file's content; FileNotFoundError if there is none."""
        if (path := self.local_path) is not None:
            with (path / name).open("rb", buffering=0) as file:
                yield file
            return
        filesystem, root = self.open()
        with filesystem.open_input_stream(f"{root}/{name}") as stream:
            yield stream

    @contextlib.contextmanager
    def reading_at(self, name: str) -> Iterator[Any]:
        """Open a file that is read by `size()` and `read_at(num_bytes, offset)`; FileNotFoundError if there is none."""
        filesystem, root = self.open()
        with filesystem.open_input_file(f"{root}/{name}") as file:
            yield file

    def write_bytes(self, name: str, content: bytes | memoryview) -> None:
        """Write a file atomically: complete or not at all, whatever dies in between; OSError on failure."""
        with self.writing(name) as stream:
            write_all(stream, content)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Open a stream for a file; on a local disk, the file appears when the block ends without an error."""
        if (path := self.local_path) is None:
            filesystem, root = self.open()
            with filesystem.open_output_stream(f"{root}/{name}") as stream:
                yield stream
            return
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_TEMPORARY}{target.name}")
        try:
            with temporary.open("wb", buffering=0) as file:
                yield file
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)  # a full disk needs the room
            raise
        _sync_directory(target.parent)

    @property
    def draft(self) -> Storage:
        """Directory of this one's files until `publish_draft`: next to it; on an object store, this directory."""
        path = self.local_path
        return self if path is None else Storage(str(path.with_name(f"{_TEMPORARY}{path.name}")))

    def publish_draft(self) -> None:
        """Rename the draft to this directory, on disk when this returns; on an object store, both are the same."""
        if (path := self.local_path) is not None:
            Path(self.draft.uri).rename(path)
            _sync_directory(path.parent)

    def publish(self, files: Mapping[str, Writer], last: str) -> None:
        """Write a directory of files that becomes visible only when complete. `last` is written after the others.

        Local: written under a temporary name, then renamed. Object store: readers look for `last`.
        """
        draft, is_local = self.draft, self.local_path is not None
        if is_local:
            draft.delete()  # left by a process that died here before
        try:
            for name in [name for name in files if name != last] + [last]:
                with draft.writing(name) as stream:
                    files[name](stream)
            self.publish_draft()
        except BaseException:
            if is_local:
                draft.delete()  # a full disk needs the room
            raise

    def list_directories(self) -> list[str]:
        """Return the sorted names of directories directly inside, without hidden ones; empty if this doesn't exist."""
        from pyarrow.fs import FileType

        return [info.base_name for info in self._infos() if info.type == FileType.Directory and not _hidden(info)]

    def list_files(self) -> list[str]:
        """Return the sorted names of files directly inside, without hidden ones; empty if this doesn't exist."""
        return list(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Return {name: bytes} of files directly inside, sorted, without hidden ones; empty if this doesn't exist."""
        from pyarrow.fs import FileType

        return {i.base_name: i.size for i in self._infos() if i.type == FileType.File and not _hidden(i)}

    def _infos(self) -> list[Any]:
        from pyarrow.fs import FileSelector

        filesystem, root = self.open()
        found = filesystem.get_file_info(FileSelector(root, allow_not_found=True))
        return sorted(found, key=lambda info: info.base_name)

    def sweep(self) -> list[str]:
        """Remove unfinished files and directories of dead processes directly inside; return their names."""
        from pyarrow.fs import FileType

        unfinished = [info for info in self._infos() if info.base_name.startswith(_TEMPORARY)]
        for info in unfinished:
            if info.type == FileType.Directory:
                self.child(info.base_name).delete()
            else:
                self.delete_file(info.base_name)
        return [info.base_name for info in unfinished]

    def move_to(self, target: Storage) -> None:
        """Move this directory of files to another place on the same file system; OSError if that fails."""
        if (path := self.local_path) is not None:
            Path(target.uri).parent.mkdir(parents=True, exist_ok=True)
            path.rename(target.uri)
            return
        filesystem, root = self.open()
        for name in self.list_files():
            filesystem.copy_file(f"{root}/{name}", f"{target.open()[1]}/{name}")
        self.delete()

    def exists(self, name: str = "") -> bool:
        """Return whether a file or directory of that name exists."""
        from pyarrow.fs import FileType

        filesystem, root = self.open()
        return bool(filesystem.get_file_info(f"{root}/{name}".rstrip("/")).type != FileType.NotFound)

    def delete(self) -> None:
        """Remove this directory and its content; does nothing if it doesn't exist."""
        if (path := self.local_path) is not None:
            shutil.rmtree(path, ignore_errors=True)
        elif self.exists():
            filesystem, root = self.open()
            filesystem.delete_dir(root)

    def delete_file(self, name: str) -> None:
        """Remove a file; does nothing if it doesn't exist."""
        if (path := self.local_path) is not None:
            (path / name).unlink(missing_ok=True)
        elif self.exists(name):
            filesystem, root = self.open()
            filesystem.delete_file(f"{root}/{name}")

    def require_writable(self, key: str = "run.storage") -> None:
        """Raise StorageError, naming the config key and the reason, if nothing can be written here."""
        try:
            self.write_bytes(".writable", b"")
            self.delete_file(".writable")
        except OSError as error:
            raise StorageError(f"{key}: {self.uri} can't be written: {error}. Give another {key}") from error


def write_all(stream: BinaryIO, content: bytes | memoryview) -> None:
    """Write all of `content`: a raw file may write only a part of it per call."""
    view = memoryview(content)
    while view.nbytes:
        # object stores' streams return None, and write everything
        view = view[stream.write(view) or view.nbytes :]


def _hidden(info: Any) -> bool:
    return bool(info.base_name.startswith("."))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
