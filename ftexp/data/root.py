"""A first look at data.root, before anything heavy is imported and Ray starts."""

from __future__ import annotations

from pathlib import Path

from ftexp.config.schema import DataConfig
from ftexp.config.source_names import reads_files
from ftexp.errors import DataError
from ftexp.storage.directory import absolute
from ftexp.storage.uri import is_remote


def is_missing(root: str | None) -> bool:
    """Whether a root is on this machine, and is not there."""
    return root is not None and not is_remote(root) and not Path(absolute(root)).exists()


def require_root(data: DataConfig) -> None:
    """Raise DataError if the files of a built-in source are on this machine, and are not there."""
    if reads_files(data.name) and is_missing(data.root):
        raise DataError(f"data.root={data.root} does not exist")
