"""A first check of data.root, before heavy imports and before Ray starts."""

from __future__ import annotations

from pathlib import Path

from ftexp.config.schema import DataConfig
from ftexp.config.source_names import reads_files
from ftexp.errors import DataError
from ftexp.storage.directory import absolute
from ftexp.storage.uri import is_remote


def is_missing(root: str | None) -> bool:
    """Return whether `root` is a local path that does not exist."""
    return root is not None and not is_remote(root) and not Path(absolute(root)).exists()


def require_root(data: DataConfig) -> None:
    """Raise DataError if a built-in source needs files at data.root, and that is a local path that does not exist."""
    if reads_files(data.name) and is_missing(data.root):
        raise DataError(f"data.root={data.root} does not exist")
