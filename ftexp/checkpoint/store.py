"""How bytes become a checkpoint that can be trusted.

A checkpoint is a folder `step_00000120.a1` (step, attempt) with model.pt, optimizer.pt, extra_state.pt and
manifest.json. It exists when its manifest does, and counts when every file has the size and SHA-256 that the
manifest says. Which one is the latest follows from manifests, never from names or times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftexp.errors import CheckpointError
from ftexp.storage import Storage

MANIFEST = "manifest.json"
FILES = ("model.pt", "optimizer.pt", "extra_state.pt")
_FORMAT = 1

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
    versions: dict[str, str]  # of the packages that matter
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"bytes": int, "sha256": hex}


class CheckpointStore:
    """The folder checkpoints/ of a run."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def save(self, manifest: Manifest, files: Mapping[str, bytes | memoryview]) -> Manifest:
        """Write a checkpoint, and read it back; returns its manifest once it has been verified.

        OSError if it can't be written, CheckpointError if what is there afterwards is not what was written.
        """
        described = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        complete = Manifest(**{**vars(manifest), "files": described})
        text = json.dumps({"format": _FORMAT, **vars(complete)}, indent=1).encode()
        self.storage.child(manifest.name).publish({**files, MANIFEST: text}, last=MANIFEST)
        self.read(complete)
        return complete

    def manifests(self, rejected: Rejected) -> list[Manifest]:
        """Every checkpoint that has a readable manifest, newest step first; its files aren't checked yet."""
        found = []
        for name in self.storage.list_folders():
            try:
                found.append(self._manifest(name))
            except (OSError, ValueError, KeyError, TypeError) as error:
                rejected(name, f"no readable manifest: {type(error).__name__}")
        return sorted(found, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)

    def latest(self, rejected: Rejected) -> tuple[Manifest, dict[str, bytes]] | None:
        """The verified checkpoint of the highest step, with its files; damaged ones are told to `rejected`."""
        for manifest in self.manifests(rejected):
            try:
                return manifest, self.read(manifest)
            except CheckpointError as error:
                rejected(manifest.name, str(error))
        return None

    def read(self, manifest: Manifest) -> dict[str, bytes]:
        """Read a checkpoint's files; CheckpointError, with the reason, if any isn't what the manifest says."""
        folder, contents = self.storage.child(manifest.name), {}
        for name in FILES:
            if name not in manifest.files:
                raise CheckpointError(f"{name} isn't in the manifest")
            try:
                contents[name] = folder.read_bytes(name)
            except OSError as error:
                raise CheckpointError(f"{name} can't be read ({type(error).__name__})") from error
            expected = manifest.files[name]
            if len(contents[name]) != expected["bytes"]:
                raise CheckpointError(f"{name} has {len(contents[name])} bytes, not {expected['bytes']}")
            if _sha256(contents[name]) != expected["sha256"]:
                raise CheckpointError(f"{name} differs from its SHA-256")
        return contents

    def by_name(self, name: str) -> Manifest:
        """The manifest of one checkpoint; CheckpointError if there is none."""
        try:
            return self._manifest(name)
        except (OSError, ValueError, KeyError, TypeError) as error:
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

    def _manifest(self, name: str) -> Manifest:
        content = json.loads(self.storage.child(name).read_bytes(MANIFEST))
        if content.pop("format") != _FORMAT:
            raise ValueError("written by another version of ftexp")
        manifest = Manifest(**content)
        if manifest.name != name:
            raise ValueError(f"the manifest is that of {manifest.name}")
        return manifest


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def kept_names(manifests: list[Manifest], num_to_keep: int | None, best_step: int | None) -> set[str]:
    """Names to keep: the `num_to_keep` of the highest steps (None: all), and the one of the best step."""
    newest_first = sorted(manifests, key=lambda manifest: (manifest.step, manifest.attempt), reverse=True)
    kept = {manifest.name for manifest in newest_first[:num_to_keep]}
    return kept | {next((m.name for m in newest_first if m.step == best_step), "")} - {""}
