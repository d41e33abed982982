"""Directories of trackers that write files."""

from __future__ import annotations

from pathlib import Path

from ftexp.storage.directory import Storage
from ftexp.storage.uri import is_remote
from ftexp.trackers.registry import TrackedRun


def own_directory(base: str | None, run: TrackedRun) -> Path:
    """Return a run's own directory: its run directory, or, with a `base`, <base>/[<sweep>/]<name>."""
    if base is not None:
        return Path(Storage.at(base, *([run.sweep] if run.sweep else []), run.name).uri)
    assert not is_remote(run.uri), "checks ask for a base then"
    return Path(run.uri)
