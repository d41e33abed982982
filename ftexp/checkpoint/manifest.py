"""manifest.json: the facts of a checkpoint, with the size and hash of each file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ftexp.checkpoint.hashing import hex_of, kind_of
from ftexp.errors import CheckpointError

MANIFEST = "manifest.json"
MODEL, OPTIMIZER, EXTRA = FILES = ("model.pt", "optimizer.pt", "extra_state.pt")
_FORMAT = 3
_READABLE = (2, _FORMAT)  # 2: no shards, and SHA-256 in place of BLAKE3


@dataclass(frozen=True)
class Manifest:
    """The facts of a checkpoint, with the size and hash of each file."""

    name: str  # name of its directory
    step: int
    epoch: int
    position: int
    attempt: int
    world_size: int
    metrics: dict[str, float]
    state_versions: dict[str, int]  # format versions of the states in extra_state.pt, by name
    written_by: str  # the run, and the time
    written_at: float  # seconds since 1970
    versions: dict[str, str]  # versions of the packages that matter
    fingerprint: dict[str, Any]  # the config keys that define the run
    # name -> {"bytes": int, "blake3": hex}; for shards {"bytes", "header_bytes", "header_blake3"}, see slices.py
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    # device mesh that wrote a sharded checkpoint: {"dims": {name: size}, "num_shards": int}; None: not sharded
    mesh: dict[str, Any] | None = None

    @property
    def num_shards(self) -> int | None:
        """Number of shards; None if the checkpoint is not sharded."""
        return None if self.mesh is None else int(self.mesh["num_shards"])

    @property
    def num_bytes(self) -> int:
        """Size of the checkpoint's files."""
        return sum(int(file["bytes"]) for file in self.files.values())


def content_hash(manifest: Manifest, name: str) -> str:
    """Return a hash that identifies the content of one of FILES; CheckpointError if there is no such file."""
    if manifest.num_shards is not None:
        names = [EXTRA, *(shard for shard in shard_files(manifest, name) if shard in manifest.files)]
        return hex_of(json.dumps([expected_of(manifest, each) for each in names], sort_keys=True).encode())
    described = expected_of(manifest, name)
    digest: str = described[kind_of(described)]
    return digest


def shard_file(name: str, shard: int, num_shards: int) -> str:
    """Return the name of the file with a shard of `name`, of FILES."""
    return f"{name.removesuffix('.pt')}.{shard:05d}-of-{num_shards:05d}.safetensors"


def shard_files(manifest: Manifest, name: str) -> list[str]:
    """Return the names of the files with all shards of `name`, of FILES; not all of them need exist."""
    num_shards = manifest.num_shards or 0
    return [shard_file(name, shard, num_shards) for shard in range(num_shards)]


def expected_of(manifest: Manifest, name: str) -> dict[str, Any]:
    """Return a file's manifest entry; CheckpointError if there is none."""
    if name not in manifest.files:
        raise CheckpointError(f"{name} isn't in the manifest")
    return manifest.files[name]


def encode(manifest: Manifest) -> bytes:
    """Return the content of manifest.json."""
    content = {"format": _FORMAT, **vars(manifest)}
    return json.dumps({**content, "sha256": sha256_of(content)}, indent=1).encode()


def decode(text: bytes, where: str, name: str) -> Manifest:
    """Read manifest.json of the checkpoint `name`, at `where`.

    ValueError, KeyError, TypeError or AttributeError if it isn't as it was written; CheckpointError if it is in another
    format.
    """
    content = json.loads(text)
    if content.pop("sha256") != sha256_of(content):
        raise ValueError("the manifest is not as it was written")
    if (written_in := content.pop("format")) not in _READABLE:
        raise CheckpointError(
            f"{where} is in format {written_in}, and this ftexp reads formats {' and '.join(map(str, _READABLE))}: "
            "resume with the version that wrote it, or choose another run.name"
        )
    manifest = Manifest(**content)
    if manifest.name != name:
        raise ValueError(f"the manifest is that of {manifest.name}")
    return manifest


def sha256_of(content: dict[str, Any]) -> str:
    """Return the hash of a manifest's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_name(step: int, attempt: int) -> str:
    """Return the name of the checkpoint that an attempt saves at `step`."""
    return f"step_{step:08d}.a{attempt}"


def kept_names(manifests: list[Manifest], num_to_keep: int | None, steps: Collection[int]) -> set[str]:
    """Return the names to keep: the `num_to_keep` of the highest steps (None: all), and those of `steps`.

    If one of `steps` was not saved, the next saved step is kept instead.
    """
    newest_first = sorted(manifests, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)
    kept = {manifest.name for manifest in newest_first[:num_to_keep]}
    for step in steps:
        if since := [each for each in newest_first if each.step >= step]:
            kept.add(min(since, key=lambda each: each.step).name)  # of equal steps, the newest attempt comes first
    return kept
