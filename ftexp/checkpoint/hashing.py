"""Hashes of a checkpoint's bytes: BLAKE3, which takes a third of SHA-256's time; SHA-256 in checkpoints of format 2."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, BinaryIO, Protocol

from blake3 import blake3

from ftexp.errors import CheckpointError
from ftexp.storage.directory import write_all

BLAKE3, SHA256 = "blake3", "sha256"  # keys of a file's manifest entry
TITLES = {BLAKE3: "BLAKE3", SHA256: "SHA-256"}


class Hash(Protocol):
    """An incremental hash with hashlib's interface."""

    def update(self, data: Any, /) -> Any:
        """Add bytes."""

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far."""


def new_hash(kind: str = BLAKE3) -> Hash:
    """Return a new hash of a kind; it uses only the calling thread, since training needs the cores."""
    made: Hash = hashlib.sha256() if kind == SHA256 else blake3(max_threads=1)
    return made


def hex_of(data: Any) -> str:
    """Return the BLAKE3 of bytes."""
    found = new_hash()
    found.update(data)
    return found.hexdigest()


def kind_of(described: Mapping[str, Any]) -> str:
    """Return the kind of hash in a file's manifest entry."""
    return BLAKE3 if BLAKE3 in described else SHA256


def require_same(name: str, described: Mapping[str, Any], num_bytes: int, digest: str) -> None:
    """Raise CheckpointError if a file differs from its manifest entry."""
    if num_bytes != described["bytes"]:
        raise CheckpointError(f"{name} has {num_bytes} bytes, not {described['bytes']}")
    kind = kind_of(described)
    if digest != described[kind]:
        raise CheckpointError(f"{name} differs from its {TITLES[kind]}")


class HashedStream:
    """A stream that counts and hashes the bytes that it passes on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest, self._num_bytes = new_hash(), 0

    def write(self, data: bytes | memoryview) -> int:
        """Pass on all of `data`; OSError if the stream does not accept it."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._digest.update(view)
        self._num_bytes += len(view)
        write_all(self._stream, view)
        return len(view)

    def flush(self) -> None:
        """Do nothing, since nothing is buffered here."""

    def described(self) -> dict[str, Any]:
        """Return the manifest entry of the bytes so far."""
        return {"bytes": self._num_bytes, BLAKE3: self._digest.hexdigest()}
