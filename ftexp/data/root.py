"""A first check of data.root, before heavy imports and before Ray starts."""

from __future__ import annotations

from pathlib import Path

from ftexp.config.schema import DataConfig
from ftexp.config.source_names import reads_files
from ftexp.errors import DataError
from ftexp.storage.directory import absolute
from ftexp.storage.uri import is_remote


def is_missing(data: DataConfig) -> bool:
    """Return whether a built-in source reads files at a root on this machine, and that root does not exist.

    Other sources may download to their root, or read it as something else than a path.
    """
    root = data.root if reads_files(data.name) else None
    return root is not None and not is_remote(root) and not Path(absolute(root)).exists()


def require_root(data: DataConfig) -> None:
    """Raise DataError if the root of a built-in source is on this machine and does not exist."""
    if is_missing(data):
        raise DataError(f"data.root={data.root} does not exist")
