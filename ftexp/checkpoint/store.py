"""Writing, verifying and finding checkpoints in a storage.

A checkpoint is a directory `step_00000120.a1` (step, attempt) with model.pt, optimizer.pt, extra_state.pt and
manifest.json; if the model is sharded, files of each process replace the first two. It exists once its manifest does,
and is valid if every file has the size and hash in the manifest. The latest is found from manifests, never from names
or file times. A rejected one (truncated, corrupt, incomplete) is moved to `.rejected/`, where it can be inspected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from ftexp.checkpoint import slices
from ftexp.checkpoint.hashing import HashedStream, kind_of, new_hash, require_same
from ftexp.checkpoint.manifest import EXTRA, FILES, MANIFEST, Manifest, decode, encode, expected_of
from ftexp.errors import CheckpointError
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage, Writer

REJECTED = ".rejected"
_CHUNK_BYTES = 1 << 20
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# errors of reading a truncated or missing manifest
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)

Rejected = Callable[[str, str], None]  # name of the checkpoint, and the reason


class CheckpointStore:
    """The directory checkpoints/ of a run."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def save(self, manifest: Manifest, files: Mapping[str, Writer]) -> Manifest:
        """Write a checkpoint and read it back; returns its manifest.

        OSError if it can't be written, CheckpointError if the files there differ from what was written.
        """
        if self.storage.local_path is not None:
            self.storage.child(manifest.name).draft.delete()  # left by a process that died here before
        try:
            return self.commit(dataclasses.replace(manifest, files=self.write(manifest.name, files)))
        except BaseException:
            self.discard(manifest.name)
            raise

    def write(self, name: str, files: Mapping[str, Writer]) -> dict[str, dict[str, Any]]:
        """Write files of an uncommitted checkpoint, and read them back; errors as of `save`.

        Returns the files' manifest entries.
        """
        return self._write_to(self.storage.child(name).draft, files)

    def _write_to(self, directory: Storage, files: Mapping[str, Writer]) -> dict[str, dict[str, Any]]:
        described = {}
        for file, write in files.items():
            with directory.writing(file) as stream:
                described[file] = _written(stream, write)
        for file, expected in described.items():
            self._verify_file(directory, file, expected)
        return described

    def commit(self, manifest: Manifest) -> Manifest:
        """Publish a checkpoint whose files have been written, by any processes; errors as of `save`."""
        directory = self.storage.child(manifest.name)
        there = directory.draft.sizes()
        if missing := [name for name, each in manifest.files.items() if there.get(name) != each["bytes"]]:
            raise CheckpointError(
                f"{missing[0]} was written, and isn't at {directory.draft.uri}: run.storage must be one directory for "
                "all workers, also on other machines"
            )
        directory.draft.write_bytes(MANIFEST, encode(manifest))
        directory.publish_draft()
        return manifest

    def add(self, manifest: Manifest, files: Mapping[str, Writer]) -> Manifest:
        """Add files to an existing checkpoint; returns its new manifest. On an error, as of `save`, it is as before."""
        directory = self.storage.child(manifest.name)
        complete = dataclasses.replace(manifest, files=manifest.files | self._write_to(directory, files))
        directory.write_bytes(MANIFEST, encode(complete))
        return complete

    def discard(self, name: str) -> None:
        """Delete the files of a checkpoint that won't be committed, since a full disk needs the room."""
        with contextlib.suppress(OSError):  # the storage is down; without a manifest, the files are no checkpoint
            self.storage.child(name).draft.delete()

    def manifests(self, rejected: Rejected) -> list[Manifest]:
        """Return all readable manifests, the highest step first; report others to `rejected`. Files aren't verified."""
        found = []
        for name in self.storage.list_directories():
            try:
                found.append(self._manifest(name))
            except _UNREADABLE as error:
                rejected(name, self._why_unreadable(error))
        return sorted(found, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)

    def latest(self, rejected: Rejected) -> Manifest | None:
        """Return the verified checkpoint of the highest step; report the others to `rejected`."""
        return next((each for each in self.manifests(rejected) if self._is_whole(each, rejected)), None)

    def candidates(self, rejected: Rejected) -> Iterator[Manifest]:
        """Yield the verified checkpoints, the highest step first; report the others to `rejected`.

        Sharded ones aren't verified yet: each process verifies the parts that it reads.
        """
        for manifest in self.manifests(rejected):
            if manifest.mesh is not None or self._is_whole(manifest, rejected):
                yield manifest

    def _is_whole(self, manifest: Manifest, rejected: Rejected) -> bool:
        try:
            self.verify(manifest)
        except CheckpointError as error:
            rejected(manifest.name, str(error))
            return False
        return True

    def verify(self, manifest: Manifest) -> None:
        """Verify a checkpoint's files, a chunk at a time; CheckpointError, with the reason, if one isn't as written."""
        directory = self.storage.child(manifest.name)
        for name in FILES if manifest.mesh is None else {EXTRA, *manifest.files}:
            self._verify_file(directory, name, expected_of(manifest, name))

    def verify_file(self, manifest: Manifest, name: str) -> None:
        """Verify one file; errors as of `verify`."""
        self._verify_file(self.storage.child(manifest.name), name, expected_of(manifest, name))

    def _verify_file(self, directory: Storage, name: str, expected: dict[str, Any]) -> None:
        digest, num_bytes, buffer = new_hash(kind_of(expected)), 0, memoryview(bytearray(_CHUNK_BYTES))
        try:
            if slices.HEADER in expected:
                slices.verify(directory, name, expected)
                return
            with directory.reading(name) as stream:
                while size := stream.readinto(buffer):  # type: ignore[attr-defined]  # raw files have readinto, and so do pyarrow's
                    digest.update(buffer[:size])
                    num_bytes += size
        except OSError as error:
            raise self.damage(name, error) from error
        require_same(name, expected, num_bytes, digest.hexdigest())

    def read(self, manifest: Manifest) -> dict[str, bytes]:
        """Return a checkpoint's files, verified; CheckpointError, with the reason, if one isn't as written."""
        return {name: self.read_file(manifest, name) for name in FILES}

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """Return one file of a checkpoint, verified; CheckpointError, with the reason, if it isn't as written."""
        expected = expected_of(manifest, name)
        try:
            content = self.storage.child(manifest.name).read_bytes(name)
        except OSError as error:
            raise self.damage(name, error) from error
        digest = new_hash(kind_of(expected))
        digest.update(content)
        require_same(name, expected, len(content), digest.hexdigest())
        return content

    def by_name(self, name: str) -> Manifest:
        """Return the manifest of one checkpoint; CheckpointError if there is none."""
        try:
            return self._manifest(name)
        except _UNREADABLE as error:
            if isinstance(error, OSError):
                self.damage(MANIFEST, error)  # raises the error if the storage doesn't answer
            available = ", ".join(self.storage.list_directories()) or "none"
            raise CheckpointError(
                f"{self.storage.uri} has no checkpoint '{name}' with a readable manifest. Available: {available}"
            ) from error

    def delete_all_but(self, kept: Iterable[str]) -> None:
        """Remove the other checkpoints. The caller has verified one of `kept`."""
        keep = set(kept)
        for manifest in self.manifests(lambda *_: None):
            if manifest.name not in keep:
                self.storage.child(manifest.name).delete()

    def quarantine(self, name: str) -> None:
        """Move a rejected checkpoint to `.rejected/`; OSError if that fails.

        On an object store, a directory without a manifest only holds partial uploads, and is deleted.
        """
        directory = self.storage.child(name)
        if directory.local_path is None and not directory.exists(MANIFEST):
            directory.delete()
            return
        taken = set(self.storage.child(REJECTED).list_directories())
        number = next(number for number in itertools.count() if f"{name}.{number}" not in taken)
        directory.move_to(self.storage.child(REJECTED, f"{name}.{number}"))

    def _manifest(self, name: str) -> Manifest:
        directory = self.storage.child(name)
        return decode(directory.read_bytes(MANIFEST), directory.uri, name)

    def damage(self, name: str, error: OSError) -> CheckpointError:
        """Return a CheckpointError if `error` shows damage; if the storage just doesn't answer, raise `error`."""
        shows_damage = isinstance(error, _GONE) or (self.storage.local_path is not None and error.errno == errno.EIO)
        if not shows_damage:
            raise error
        return CheckpointError(f"{name} can't be read ({type(error).__name__})")

    def _why_unreadable(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "it has no manifest"
        if isinstance(error, OSError):
            return str(self.damage(MANIFEST, error))
        return f"its manifest can't be read ({type(error).__name__})"


def _written(stream: BinaryIO, write: Writer) -> dict[str, Any]:
    """Write a file's content; returns its manifest entry."""
    if isinstance(write, slices.SliceFile):
        write(stream)
        return write.described
    hashed = HashedStream(stream)
    try:
        write(hashed)  # type: ignore[arg-type]  # has the methods that torch.save calls
    except RuntimeError as error:  # torch.save raises it when the stream fails; the cause is in __context__
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return hashed.described()


def locate(uri: str) -> tuple[CheckpointStore, Manifest]:
    """Return the checkpoint at `uri`, or the latest of the run at `uri`, verified; CheckpointError if there is none."""
    directory = Storage.at(uri)
    if directory.exists(MANIFEST):
        store = CheckpointStore(directory.parent)
        manifest = store.by_name(directory.name)
        store.verify(manifest)
        return store, manifest
    store = CheckpointStore(directory.child(CHECKPOINTS))
    reasons: list[str] = []
    latest = store.latest(lambda name, reason: reasons.append(f"{name}: {reason}"))
    if latest is None:
        damaged = f" ({'; '.join(reasons)})" if reasons else ""
        raise CheckpointError(
            f"{directory.uri} holds no checkpoint that verifies{damaged}: set a run directory, or a directory under "
            f"its {CHECKPOINTS}/"
        )
    return store, latest
