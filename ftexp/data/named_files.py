"""What sources of files that hold many samples share: whose split a file is, and what its labels mean."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config import DataConfig
from ftexp.data.listing import files_at
from ftexp.data.order import Int64s
from ftexp.data.splits import SPLITS
from ftexp.errors import DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem


def files_by_split(filesystem: FileSystem, root: str, config: DataConfig, suffix: str) -> dict[str, list[str]]:
    """{split: files}, sorted. Files, or folders of them, named train*, val* and test* are splits if there is a train.

    DataError if `root` can't be listed, or is neither a file nor a folder that holds one ending in `suffix`.
    """
    return _by_split(root, [info.path for info in data_files(filesystem, root, config, suffix)])


def data_files(filesystem: FileSystem, root: str, config: DataConfig, suffix: str) -> list[FileInfo]:
    """The file at data.root, or all below it that end in `suffix` and aren't hidden, sorted; DataError if none."""
    infos = files_at(filesystem, root, config)
    if [info.path for info in infos] != [root]:
        infos = [info for info in infos if _is_data(PurePosixPath(info.path).relative_to(root), suffix)]
    if not infos:
        raise DataError(
            f"data.root={config.root} is neither a {suffix[1:]} file nor a folder with {suffix} files in it"
        )
    return sorted(infos, key=lambda info: info.path)


def _is_data(path: PurePosixPath, suffix: str) -> bool:
    return path.suffix == suffix and not any(part.startswith(".") for part in path.parts)


def _by_split(root: str, paths: list[str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for path in paths:
        relative = PurePosixPath(path).relative_to(root).parts if path != root else (PurePosixPath(path).name,)
        split = next((s for part in relative for s in SPLITS if part.startswith(s)), "train")  # outermost part wins
        named.setdefault(split, []).append(path)
    explicit = any(part.startswith("train") for path in paths for part in PurePosixPath(path).relative_to(root).parts)
    return named if explicit else {"train": paths}


def as_label(text: str) -> str | int:
    """A label that was written as text: a number if it looks like one."""
    return int(text) if text.isascii() and text.isdigit() else text


def class_numbers(raw: dict[str, list[Any]], where: str) -> tuple[list[str], dict[str, Int64s]]:
    """Class names, and each split's labels as numbers; DataError unless all are text, or whole numbers from 0.

    `where` they stand, for that error.
    """
    values = [value for column in raw.values() for value in column]
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return names, {split: np.array([numbers[v] for v in column], np.int64) for split, column in raw.items()}
    if all(isinstance(value, int) and value >= 0 for value in values):
        names = [str(number) for number in range(max(values) + 1)]
        return names, {split: np.array(column, np.int64) for split, column in raw.items()}
    shown = ", ".join(sorted({repr(value) for value in values if not (isinstance(value, int) and value >= 0)})[:5])
    raise DataError(f"{where} holds {shown}: labels are all text, or all whole numbers from 0")
