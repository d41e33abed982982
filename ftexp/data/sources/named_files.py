"""Files of sources that store many samples per file, and their splits by name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ftexp.config.schema import DataConfig
from ftexp.data.info import SPLITS, reasons
from ftexp.data.sources.entries import Account, files_at
from ftexp.errors import DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem


def files_by_split(
    filesystem: FileSystem, root: str, config: DataConfig, suffix: str, account: Account
) -> dict[str, list[str]]:
    """Return {split: sorted files}.

    Files, or directories of files, named train*, val* and test* form splits if there is a train*; otherwise all files
    are train.

    DataError if `root` can't be listed, or is neither a file nor a directory with files that end in `suffix`.
    """
    return _by_split(root, [info.path for info in data_files(filesystem, root, config, suffix, account)])


def data_files(filesystem: FileSystem, root: str, config: DataConfig, suffix: str, account: Account) -> list[FileInfo]:
    """Return the file at data.root, or all files below it that end in `suffix`, sorted; DataError if there is none."""
    infos = files_at(filesystem, root, config, account, (suffix,))
    if not infos:
        raise DataError(
            f"data.root={config.root} is neither a {suffix[1:]} file nor a directory with {suffix} files in it"
            + reasons(account.excluded, account.bad)
        )
    return sorted(infos, key=lambda info: info.path)


def _by_split(root: str, paths: list[str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for path in paths:
        relative = PurePosixPath(path).relative_to(root).parts if path != root else (PurePosixPath(path).name,)
        split = next((s for part in relative for s in SPLITS if part.startswith(s)), "train")  # outermost part wins
        named.setdefault(split, []).append(path)
    explicit = any(part.startswith("train") for path in paths for part in PurePosixPath(path).relative_to(root).parts)
    return named if explicit else {"train": paths}
