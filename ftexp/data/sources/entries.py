"""Listing of a source's entries. Each is accounted for: used, excluded by a rule (counted), or bad (named)."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from ftexp.config.schema import DataConfig
from ftexp.data.info import BadSample, Excluded
from ftexp.data.listing import retried
from ftexp.errors import DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

# directories that NAS systems, archivers and operating systems create among a user's files
_SYSTEM_DIRECTORIES = frozenset(
    {
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "__macosx", "lost+found",
        "system volume information",
    }
)  # fmt: skip

_Directory = tuple[int, int]  # identity of a directory: device and inode


class Account:
    """Entries of a source that are not samples, with the reasons."""

    def __init__(self) -> None:
        self.bad: list[BadSample] = []
        self._excluded: dict[str, tuple[int, str]] = {}

    @property
    def excluded(self) -> list[Excluded]:
        """Excluded entries, one item per rule."""
        return [Excluded(reason, count, example) for reason, (count, example) in self._excluded.items()]

    def add_bad(self, where: str, reason: str) -> None:
        """Record an entry that would be a sample if it could be read."""
        self.bad.append(BadSample(where, reason))

    def exclude(self, where: str, reason: str, count: int = 1) -> None:
        """Count entries that a rule excludes; the first entry for a reason is its example."""
        before, example = self._excluded.get(reason, (0, where))
        self._excluded[reason] = (before + count, example)

    def add(self, other: Account) -> None:
        """Add all entries of another account."""
        self.bad += other.bad
        for excluded in other.excluded:
            self.exclude(excluded.example, excluded.reason, excluded.count)


def exclusion(name: str) -> str | None:
    """Return why every source excludes entries of this name; None if they aren't excluded."""
    if name.startswith(".") and name not in (".", ".."):
        return "hidden"
    return "system directory" if name.lower() in _SYSTEM_DIRECTORIES else None


def path_exclusion(parts: Sequence[str]) -> tuple[int, str] | None:
    """Return (number of leading parts that form the excluded entry, reason); None if no part is excluded."""
    found = ((number, exclusion(name)) for number, name in enumerate(parts, start=1))
    return next(((number, reason) for number, reason in found if reason is not None), None)


def files_at(
    filesystem: FileSystem, root: str, config: DataConfig, account: Account, endings: Collection[str] = ()
) -> list[FileInfo]:
    """Return the file at data.root, or all files below it; DataError if it can't be listed.

    Args:
        filesystem: file system of `root`.
        root: a file, or a directory.
        config: provides data.root for errors.
        account: receives every other entry below `root`; an excluded directory counts as one entry.
        endings: name endings of the files to select, in lower case; names match in any case. Empty: all files.
    """
    from pyarrow.fs import FileType, LocalFileSystem

    try:
        info = retried(lambda: filesystem.get_file_info(root))
        if info.type == FileType.File:
            return [info]
        if info.type == FileType.NotFound:
            raise DataError(f"data.root={config.root} does not exist")
        if isinstance(filesystem, LocalFileSystem):
            return _local_files(root, account, endings)
        return _stored_files(filesystem, root, account, endings)
    except OSError as error:
        raise DataError(f"data.root={config.root} can't be listed: {error}") from error


def _ending_exclusion(name: str, endings: Collection[str]) -> str | None:
    if not endings or name.lower().endswith(tuple(endings)):
        return None
    return f"no {next(iter(endings))} file" if len(endings) == 1 else "no image extension"


def _stored_files(filesystem: FileSystem, root: str, account: Account, endings: Collection[str]) -> list[FileInfo]:
    """Return the files in an object store, which has neither links nor real directories."""
    from pyarrow.fs import FileSelector, FileType

    found, seen = [], set()
    for info in retried(lambda: filesystem.get_file_info(FileSelector(root, recursive=True))):
        if info.type != FileType.File:
            continue
        parts = PurePosixPath(info.path).relative_to(root).parts
        if (excluded := path_exclusion(parts)) is not None:
            number, reason = excluded
            if parts[:number] not in seen:
                seen.add(parts[:number])
                account.exclude("/".join([root, *parts[:number]]), reason)
        elif (left_aside := _ending_exclusion(parts[-1], endings)) is not None:
            account.exclude(info.path, left_aside)
        else:
            found.append(info)
    return found


class _Contents(NamedTuple):
    """Entries of one local directory."""

    path: str  # one of its paths
    files: list[tuple[str, int]]  # name, size in bytes
    directories: list[tuple[str, _Directory, bool]]  # name, identity, whether it is a symbolic link


def _local_files(root: str, account: Account, endings: Collection[str]) -> list[FileInfo]:
    """Return the files below `root` on a local disk, with every path to them without a cycle.

    OSError if `root` can't be read.
    """
    from pyarrow.fs import FileInfo, FileType

    top = _identity(Path(root).stat())
    contents: dict[_Directory, _Contents] = {}
    waiting = [(root, top)]
    while waiting:
        path, which = waiting.pop()
        if which in contents:  # already listed through another path
            continue
        try:
            contents[which] = _listed(path, account, endings)
        except OSError as error:
            if which == top:
                raise
            account.add_bad(path, f"{type(error).__name__}: {error}")
            contents[which] = _Contents(path, [], [])
        waiting += [(posixpath.join(path, name), below) for name, below, _ in contents[which].directories]
    _cut_cycles(contents, account)
    found, waiting = [], [(root, top)]
    while waiting:
        path, which = waiting.pop()
        _, files, directories = contents[which]
        found += [FileInfo(posixpath.join(path, name), FileType.File, size=size) for name, size in files]
        waiting += [(posixpath.join(path, name), below) for name, below, _ in directories]
    return found


def _listed(path: str, account: Account, endings: Collection[str]) -> _Contents:
    """Read one directory; OSError if it can't be read."""

    def look() -> list[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    files: list[tuple[str, int]] = []
    directories: list[tuple[str, _Directory, bool]] = []
    for entry in retried(look):
        if not _is_text(entry.name):
            account.add_bad(os.fsencode(entry.path).decode(errors="backslashreplace"), "its name is not UTF-8")
            continue
        if (hidden := exclusion(entry.name)) is not None:
            account.exclude(entry.path, hidden)
            continue
        left_aside = _ending_exclusion(entry.name, endings)
        if left_aside is not None and entry.is_file(follow_symlinks=False):
            account.exclude(entry.path, left_aside)
            continue
        try:
            status = entry.stat()
        except OSError as error:
            account.add_bad(entry.path, _lost(entry, error))
            continue
        if stat.S_ISDIR(status.st_mode):
            directories.append((entry.name, _identity(status), entry.is_symlink()))
        elif left_aside is not None or not stat.S_ISREG(status.st_mode):
            account.exclude(entry.path, left_aside or "no regular file")
        else:
            files.append((entry.name, status.st_size))
    return _Contents(path, files, directories)


def _is_text(name: str) -> bool:
    """Return whether a name is UTF-8; Python represents other bytes as surrogates, which can't be encoded."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lost(entry: os.DirEntry[str], error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and entry.is_symlink():
        return f"a symbolic link to {Path(entry.path).readlink()}, which does not exist"
    return f"{type(error).__name__}: {error}"


def _identity(status: os.stat_result) -> _Directory:
    return status.st_dev, status.st_ino


def _cut_cycles(contents: dict[_Directory, _Contents], account: Account) -> None:
    """Exclude every symbolic link through which its own directory can be reached again."""
    cut = [
        (own, link) for which, own in contents.items() for link in own.directories
        if link[2] and _leads_to(contents, link[1], which)
    ]  # fmt: skip
    for own, link in cut:
        own.directories.remove(link)
        account.exclude(posixpath.join(own.path, link[0]), "symbolic link in a directory cycle")


def _leads_to(contents: dict[_Directory, _Contents], start: _Directory, goal: _Directory) -> bool:
    waiting, seen = [start], {start}
    while waiting:
        if (which := waiting.pop()) == goal:
            return True
        below = {directory for _, directory, _ in contents[which].directories} - seen
        seen |= below
        waiting += below
    return False
