"""Folders of images."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config import DataConfig
from ftexp.data.listing import Listing, Raw, Reader, Shared, digest_of, files_at, retried
from ftexp.data.order import Int64s
from ftexp.data.sources import sources
from ftexp.data.splits import SPLITS
from ftexp.errors import DataError
from ftexp.storage import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_LIKE_SPLITS = re.compile(r"(train|test|val|valid)(ing|idation)?", re.IGNORECASE)
_SPLIT_NAMES = {"valid": "val", "validation": "val"}


@sources.register("image_folder")
def image_folder(config: DataConfig) -> Listing:
    """One folder a class, or train/, val/, test/ with such folders inside; any format that Pillow reads."""
    import pyarrow as pa

    filesystem, root = open_uri(config.root or "", "data.root")
    listed = _list_images(filesystem, root, config)
    own_splits = set(listed) <= {*SPLITS, "valid", "validation"} and "train" in listed
    if own_splits:
        by_split = _inside_splits(listed, config)
        class_names = sorted({label for files in by_split.values() for _, label in files})
    else:
        _refuse_half_splits(listed, config)
        by_split = {"train": [(f"{name}/{rest}", name) for name, files in listed.items() for rest, _ in files]}
        class_names = sorted(listed)
    numbers = {name: number for number, name in enumerate(class_names)}
    labels: dict[str, Int64s] = {}
    paths: dict[str, list[str]] = {}
    readers: dict[str, Reader] = {}
    for split, files in by_split.items():
        files.sort()
        labels[split] = np.array([numbers[label] for _, label in files], np.int64)
        folder = f"{root}/{_folder_of(listed, split)}" if own_splits else root
        paths[split] = [path for path, _ in files]
        readers[split] = FileReader(filesystem, folder, Shared(pa.array(paths[split], pa.large_string())))
    return Listing(class_names, labels, readers, digest=digest_of(class_names, labels, paths))


def _refuse_half_splits(listed: dict[str, list[tuple[str, str]]], config: DataConfig) -> None:
    """DataError if folders that look like splits, with folders inside, would be taken for classes."""
    like = [name for name in listed if _LIKE_SPLITS.fullmatch(name)]
    if len(like) > 1 and all("/" in rest for name in like for rest, _ in listed[name]):
        others = sorted(set(listed) - set(like))
        raise DataError(
            f"data.root={config.root} holds {', '.join(sorted(like))}, which look like splits, "
            + (f"beside {', '.join(others[:5])}: move these away" if others else "under other names")
            + ", and name the splits train, val and test (or valid, validation); else every folder there is a class"
        )


@dataclass(frozen=True)
class FileReader:
    """Reads files one by one. Item i is the file `paths[i]` below `folder`."""

    filesystem: FileSystem
    folder: str
    paths: Shared[Any]

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield where each file is, and how to read it."""
        for path in self.paths.get().take(items).to_pylist():
            yield f"{self.folder}/{path}", functools.partial(self._read, f"{self.folder}/{path}")

    def _read(self, path: str) -> bytes:
        def read() -> bytes:
            with self.filesystem.open_input_file(path) as file:
                return bytes(file.read())

        return retried(read)


def _inside_splits(listed: dict[str, list[tuple[str, str]]], config: DataConfig) -> dict[str, list[tuple[str, str]]]:
    """What is in class folders of the splits' folders; files beside those are left alone, as in the root."""
    by_split: dict[str, list[tuple[str, str]]] = {}
    for folder, files in listed.items():
        split = _SPLIT_NAMES.get(folder, folder)
        if split in by_split:
            raise DataError(f"data.root={config.root} holds more than one validation folder ({folder}/); keep one")
        by_split[split] = [(path, label) for path, label in files if path != label]
        if not by_split[split]:
            raise DataError(
                f"data.root={config.root}: {folder}/ holds no image in a class folder; {folder}/class/image is "
                f"expected. Without {folder}/, its samples are cut from train/ by data.val_fraction, data.test_fraction"
            )
    return by_split


def _folder_of(listed: dict[str, Any], split: str) -> str:
    return next(name for name in listed if _SPLIT_NAMES.get(name, name) == split)


def visible_files(filesystem: FileSystem, root: str, config: DataConfig) -> list[tuple[tuple[str, ...], int]]:
    """(parts of its path below data.root, size in bytes) of every file that is not hidden."""
    below = ((PurePosixPath(info.path).relative_to(root).parts, info) for info in files_at(filesystem, root, config))
    return [(parts, info.size) for parts, info in below if not any(part.startswith(".") for part in parts)]


def _list_images(filesystem: FileSystem, root: str, config: DataConfig) -> dict[str, list[tuple[str, str]]]:
    """{top folder: [(path below it, its first folder)]} of every file that is not hidden."""
    listed: dict[str, list[tuple[str, str]]] = {}
    for parts, _ in visible_files(filesystem, root, config):
        if len(parts) > 1:
            listed.setdefault(parts[0], []).append(("/".join(parts[1:]), parts[1]))
    if not listed:
        raise DataError(f"data.root={config.root} holds no image in a class folder: root/class/image is expected")
    return listed
