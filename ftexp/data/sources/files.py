"""The source image_folder: directories of images."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config.schema import DataConfig
from ftexp.data.info import SPLITS, Raw, Reader, reasons
from ftexp.data.listing import Listing, digest_of, retried
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.data.sources.entries import Account, files_at
from ftexp.data.sources.registry import register_source
from ftexp.errors import DataError
from ftexp.storage.directory import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

# Formats that Pillow reads, and heic, heif and jxl: those are images too, so without a Pillow plugin they count as bad,
# not as excluded. The list is fixed, since with Pillow's own list another version of Pillow could find other samples.
_ENDINGS = (
    ".apng", ".avif", ".bmp", ".dds", ".dib", ".gif", ".heic", ".heif", ".icns", ".ico", ".j2c", ".j2k", ".jfif",
    ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".psd", ".qoi", ".ras", ".sgi", ".tga", ".tif", ".tiff", ".webp", ".xbm", ".xpm",
)  # fmt: skip
_LIKE_SPLITS = re.compile(r"(train|test|val|valid)(ing|idation)?", re.IGNORECASE)
_NO_CLASS = "image outside of a class directory"
_SPLIT_NAMES = {"valid": "val", "validation": "val"}


@register_source("image_folder")
def image_folder(config: DataConfig) -> Listing:
    """List one directory per class, or train/, val/, test/ with such directories; images are found by extension."""
    import pyarrow as pa

    filesystem, root = open_uri(config.root or "", "data.root")
    account = Account()
    listed = _list_images(filesystem, root, config, account)
    own_splits = set(listed) <= {*SPLITS, "valid", "validation"} and "train" in listed
    if own_splits:
        by_split = _inside_splits(listed, root, config, account)
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
        directory = f"{root}/{_directory_of(listed, split)}" if own_splits else root
        paths[split] = [path for path, _ in files]
        readers[split] = FileReader(filesystem, directory, Shared(pa.array(paths[split], pa.large_string())))
    digest = digest_of(class_names, labels, paths)
    return Listing(class_names, labels, readers, bad=account.bad, digest=digest, excluded=account.excluded)


def _refuse_half_splits(listed: dict[str, list[tuple[str, str]]], config: DataConfig) -> None:
    """Raise DataError if directories that look like splits and contain directories would be used as classes."""
    like = [name for name in listed if _LIKE_SPLITS.fullmatch(name)]
    if len(like) > 1 and all("/" in rest for name in like for rest, _ in listed[name]):
        others = sorted(set(listed) - set(like))
        raise DataError(
            f"data.root={config.root} holds {', '.join(sorted(like))}, which look like splits, "
            + (f"next to {', '.join(others[:5])}: move these elsewhere" if others else "under other names")
            + ", and name the splits train, val and test (or valid, validation); else every directory there is a class"
        )


@dataclass(frozen=True)
class FileReader:
    """Reads files one by one. Item i is the file `paths[i]` below `directory`."""

    filesystem: FileSystem
    directory: str
    paths: Shared[Any]

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield each file's location and a function that reads it."""
        for path in self.paths.get().take(items).to_pylist():
            yield f"{self.directory}/{path}", functools.partial(self._read, f"{self.directory}/{path}")

    def _read(self, path: str) -> bytes:
        def read() -> bytes:
            with self.filesystem.open_input_file(path) as file:
                return bytes(file.read())

        return retried(read)


def _inside_splits(
    listed: dict[str, list[tuple[str, str]]], root: str, config: DataConfig, account: Account
) -> dict[str, list[tuple[str, str]]]:
    """Return the images in class directories of each split; files next to class directories are excluded."""
    by_split: dict[str, list[tuple[str, str]]] = {}
    for directory, files in listed.items():
        split = _SPLIT_NAMES.get(directory, directory)
        if split in by_split:
            raise DataError(
                f"data.root={config.root} holds more than one validation directory ({directory}/); keep one"
            )
        by_split[split] = [(path, label) for path, label in files if path != label]
        for path in (path for path, label in files if path == label):
            account.exclude(f"{root}/{directory}/{path}", _NO_CLASS)
        if not by_split[split]:
            raise DataError(
                f"data.root={config.root}: {directory}/ holds no image in a class directory; {directory}/class/image "
                f"is expected. Without {directory}/, its samples are cut from train/ by data.val_fraction, "
                "data.test_fraction" + reasons(account.excluded, account.bad)
            )
    return by_split


def _directory_of(listed: dict[str, Any], split: str) -> str:
    return next(name for name in listed if _SPLIT_NAMES.get(name, name) == split)


def image_files(
    filesystem: FileSystem, root: str, config: DataConfig, account: Account
) -> list[tuple[tuple[str, ...], int]]:
    """Return (parts of the path below data.root, size in bytes) of every image file."""
    infos = files_at(filesystem, root, config, account, _ENDINGS)
    return [(PurePosixPath(info.path).relative_to(root).parts, info.size) for info in infos]


def _list_images(
    filesystem: FileSystem, root: str, config: DataConfig, account: Account
) -> dict[str, list[tuple[str, str]]]:
    """Return {top directory: [(path below it, first part of that path)]} for all image files."""
    listed: dict[str, list[tuple[str, str]]] = {}
    for parts, _ in image_files(filesystem, root, config, account):
        if len(parts) > 1:
            listed.setdefault(parts[0], []).append(("/".join(parts[1:]), parts[1]))
        else:
            account.exclude("/".join([root, *parts]), _NO_CLASS)
    if not listed:
        raise DataError(
            f"data.root={config.root} holds no image in a class directory: root/class/image is expected"
            + reasons(account.excluded, account.bad)
        )
    return listed
