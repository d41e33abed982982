"""How bytes become a checkpoint that can be trusted.

A checkpoint is a folder `step_00000120.a1` (step, attempt) with model.pt, optimizer.pt, extra_state.pt and
manifest.json. It exists when its manifest does, and counts when every file has the size and SHA-256 that the
manifest says. Which one is the latest follows from manifests, never from names or times. What doesn't count is
moved to `.rejected/`, where nobody takes it for a checkpoint and its owner can still look at it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ftexp.errors import CheckpointError
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage, Writer, write_all

MANIFEST = "manifest.json"
FILES = ("model.pt", "optimizer.pt", "extra_state.pt")
REJECTED = ".rejected"
_FORMAT = 2
_CHUNK_BYTES = 1 << 20
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# what reading a torn or missing manifest raises
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)

Rejected = Callable[[str, str], None]  # name of the checkpoint, and the reason


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, and how to tell that it is whole."""

    name: str  # of its folder
    step: int
    epoch: int
    position: int
    attempt: int
    world_size: int
    metrics: dict[str, float]
    state_versions: dict[str, int]  # of extra_state.pt, by name
    written_by: str  # the run, and the time
    written_at: float  # seconds since 1970
    versions: dict[str, str]  # of the packages that matter
    fingerprint: dict[str, Any]  # the config keys that define the run
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"bytes": int, "sha256": hex}

    @property
    def num_bytes(self) -> int:
        """Size of the checkpoint's files."""
        return sum(int(file["bytes"]) for file in self.files.values())


class CheckpointStore:
    """The folder checkpoints/ of a run."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def save(self, manifest: Manifest, files: Mapping[str, Writer]) -> Manifest:
        """Write a checkpoint, and read it back; returns its manifest once it has been verified.

        OSError if it can't be written, CheckpointError if what is there afterwards is not what was written.
        """
        described: dict[str, dict[str, Any]] = {}
        complete = Manifest(**{**vars(manifest), "files": described})  # `described` fills while the files are written

        def described_writer(name: str, write: Writer) -> Writer:
            def write_hashed(stream: BinaryIO) -> None:
                hashed = _Hashed(stream)
                try:
                    write(hashed)  # type: ignore[arg-type]  # has what torch.save calls
                except RuntimeError as error:  # torch.save's own, on top of what went wrong with the stream
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from None
                    raise
                described[name] = {"bytes": hashed.num_bytes, "sha256": hashed.digest.hexdigest()}

            return write_hashed

        def write_manifest(stream: BinaryIO) -> None:
            content = {"format": _FORMAT, **vars(complete)}
            write_all(stream, json.dumps({**content, "sha256": _sha256_of(content)}, indent=1).encode())

        writers = {name: described_writer(name, write) for name, write in files.items()}
        folder = self.storage.child(manifest.name)
        folder.publish({**writers, MANIFEST: write_manifest}, last=MANIFEST)
        try:
            self.verify(complete)
        except CheckpointError:
            folder.delete()  # it must not count, nor stand in the way of the next try
            raise
        return complete

    def manifests(self, rejected: Rejected) -> list[Manifest]:
        """Every checkpoint that has a readable manifest, newest step first; its files aren't checked yet."""
        found = []
        for name in self.storage.list_folders():
            try:
                found.append(self._manifest(name))
            except _UNREADABLE as error:
                rejected(name, self._why_unreadable(error))
        return sorted(found, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)

    def latest(self, rejected: Rejected) -> Manifest | None:
        """The verified checkpoint of the highest step; damaged ones are told to `rejected`."""
        for manifest in self.manifests(rejected):
            try:
                self.verify(manifest)
            except CheckpointError as error:
                rejected(manifest.name, str(error))
            else:
                return manifest
        return None

    def verify(self, manifest: Manifest) -> None:
        """Read a checkpoint's files, a little at a time; CheckpointError, with the reason, if one isn't as written."""
        folder = self.storage.child(manifest.name)
        for name in FILES:
            expected = _expected(manifest, name)
            digest, num_bytes = hashlib.sha256(), 0
            try:
                with folder.reading(name) as stream:
                    while chunk := stream.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        num_bytes += len(chunk)
            except OSError as error:
                raise self._damage(name, error) from error
            _require_same(name, expected, num_bytes, digest.hexdigest())

    def read(self, manifest: Manifest) -> dict[str, bytes]:
        """A checkpoint's files, verified; CheckpointError, with the reason, if one isn't as written."""
        return {name: self.read_file(manifest, name) for name in FILES}

    def read_file(self, manifest: Manifest, name: str) -> bytes:
        """One file of a checkpoint, verified; CheckpointError, with the reason, if it isn't as written."""
        expected = _expected(manifest, name)
        try:
            content = self.storage.child(manifest.name).read_bytes(name)
        except OSError as error:
            raise self._damage(name, error) from error
        _require_same(name, expected, len(content), hashlib.sha256(content).hexdigest())
        return content

    def by_name(self, name: str) -> Manifest:
        """The manifest of one checkpoint; CheckpointError if there is none."""
        try:
            return self._manifest(name)
        except _UNREADABLE as error:
            available = ", ".join(self.storage.list_folders()) or "none"
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
        """Move a checkpoint that doesn't count out of the way; OSError if that can't be done.

        What has nothing but half-uploaded files, on an object store, is removed: it never was a checkpoint.
        """
        folder = self.storage.child(name)
        if folder.local_path is None and not folder.exists(MANIFEST):
            folder.delete()
            return
        taken = set(self.storage.child(REJECTED).list_folders())
        number = next(number for number in itertools.count() if f"{name}.{number}" not in taken)
        folder.move_to(self.storage.child(REJECTED, f"{name}.{number}"))

    def _manifest(self, name: str) -> Manifest:
        content = json.loads(self.storage.child(name).read_bytes(MANIFEST))
        if content.pop("sha256") != _sha256_of(content):
            raise ValueError("the manifest is not as it was written")
        if (written_in := content.pop("format")) != _FORMAT:
            raise CheckpointError(
                f"{self.storage.child(name).uri} is in format {written_in}, and this ftexp reads format {_FORMAT}: "
                "go on with the version that wrote it, or choose another run.name"
            )
        manifest = Manifest(**content)
        if manifest.name != name:
            raise ValueError(f"the manifest is that of {manifest.name}")
        return manifest

    def _damage(self, name: str, error: OSError) -> CheckpointError:
        """The damage that `error` shows. A store, or a mount, that doesn't answer shows none: its error goes on."""
        shows_damage = isinstance(error, _GONE) or (self.storage.local_path is not None and error.errno == errno.EIO)
        if not shows_damage:
            raise error
        return CheckpointError(f"{name} can't be read ({type(error).__name__})")

    def _why_unreadable(self, error: Exception) -> str:
        if isinstance(error, FileNotFoundError):
            return "it has no manifest"
        if isinstance(error, OSError):
            return str(self._damage(MANIFEST, error))
        return f"its manifest can't be read ({type(error).__name__})"


class _Hashed:
    """A stream that passes bytes on, counting and hashing them."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest, self.num_bytes = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        """Pass on all of `data`; OSError if the stream does not take it."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self.digest.update(view)
        self.num_bytes += len(view)
        write_all(self._stream, view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back here."""


def _sha256_of(content: dict[str, Any]) -> str:
    """Of a manifest's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _expected(manifest: Manifest, name: str) -> dict[str, Any]:
    if name not in manifest.files:
        raise CheckpointError(f"{name} isn't in the manifest")
    return manifest.files[name]


def _require_same(name: str, expected: dict[str, Any], num_bytes: int, sha256: str) -> None:
    if num_bytes != expected["bytes"]:
        raise CheckpointError(f"{name} has {num_bytes} bytes, not {expected['bytes']}")
    if sha256 != expected["sha256"]:
        raise CheckpointError(f"{name} differs from its SHA-256")


def locate(uri: str) -> tuple[CheckpointStore, Manifest]:
    """The checkpoint at `uri`, or the latest of the run at `uri`, verified; CheckpointError if there is none."""
    folder = Storage.at(uri)
    if folder.exists(MANIFEST):
        store = CheckpointStore(folder.parent)
        manifest = store.by_name(folder.name)
        store.verify(manifest)
        return store, manifest
    store = CheckpointStore(folder.child(CHECKPOINTS))
    reasons: list[str] = []
    latest = store.latest(lambda name, reason: reasons.append(f"{name}: {reason}"))
    if latest is None:
        damaged = f" ({'; '.join(reasons)})" if reasons else ""
        raise CheckpointError(
            f"{folder.uri} holds no checkpoint that verifies{damaged}: give a run directory, or a folder under its "
            f"{CHECKPOINTS}/"
        )
    return store, latest


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the name of the checkpoint that an attempt saves at `step`."""
    return f"step_{step:08d}.a{attempt}"


def kept_names(manifests: list[Manifest], num_to_keep: int | None, steps: Collection[int]) -> set[str]:
    """Names to keep: the `num_to_keep` of the highest steps (None: all), and those of `steps`.

    Such a step may not have been saved: then the next that was is the nearest to it.
    """
    newest_first = sorted(manifests, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)
    kept = {manifest.name for manifest in newest_first[:num_to_keep]}
    for step in steps:
        if since := [each for each in newest_first if each.step >= step]:
            kept.add(min(since, key=lambda each: each.step).name)  # of its attempts, the newest comes first
    return kept
