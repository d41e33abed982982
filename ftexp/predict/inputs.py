"""The images to predict, in a fixed order. They need no labels. Ray must be running."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import ftexp.data.build  # noqa: F401 - registers the sources that are built in
from ftexp.config.schema import SINGLE_LABEL, DataConfig
from ftexp.data.feeds.feed import CachedRows
from ftexp.data.info import BadSample, Excluded, IndexedSplit, Raw, Reader, reasons
from ftexp.data.label_cells import cell_text
from ftexp.data.labels import written_number
from ftexp.data.listing import Listing
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.data.sources.arrays import UInt8s
from ftexp.data.sources.blocks import BlockReader
from ftexp.data.sources.entries import Account, files_at
from ftexp.data.sources.files import FileReader, image_files
from ftexp.data.sources.image_list import read_list
from ftexp.data.sources.named_files import data_files
from ftexp.data.sources.parquet import RowGroup, RowGroups, labels_of
from ftexp.data.sources.registry import sources
from ftexp.data.sources.webdataset import label_endings, scan_shards
from ftexp.data.targets import Labels, distinct
from ftexp.errors import DataError
from ftexp.registry import Registry
from ftexp.storage.directory import open_uri

ALL = "all"  # all splits: every image, with or without a label
_NONE = -1  # label of an image whose class is unknown
_BLOCKS_KEPT = 1  # window of BlockReader's cache, in blocks: samples are read in the order of their files


@dataclass(frozen=True)
class Inputs:
    """Samples 0 to len(split) - 1, as tasks read them; a label of -1 means that the class is unknown."""

    split: IndexedSplit
    label_names: list[str]
    digest: str  # digest of the images' paths and file sizes
    bad: list[BadSample] = field(default_factory=list)  # files with an unknown number of images
    excluded: list[Excluded] = field(default_factory=list)  # entries that a rule excludes
    listing: str | None = None  # digest of all splits together, as recorded by a run; None: unknown


def find_inputs(config: DataConfig, split: str, class_names: list[str]) -> Inputs:
    """Find the images that `config` names; DataError if there are none.

    Args:
        config: the data; must say that samples that can't be read are skipped.
        split: train, val or test, split as in training; or all.
        class_names: the model's class names. A directory with one of these names is the class of its images.
    """
    found = every_image.get(config.name)(config, class_names) if split == ALL else _one_split(config, split)
    if not len(found.split):
        raise DataError(f"data.name={config.name} has no image for split={split}{reasons(found.excluded, found.bad)}")
    return found


every_image: Registry[Any] = Registry("data.name")  # (config, class names) -> Inputs, for sources of files


def _one_split(config: DataConfig, split: str) -> Inputs:
    found = sources.get(config.name)(config)
    if isinstance(found, Listing):
        own, names = found.splits(config, found.readers)[split], found.class_names
        files: Iterable[tuple[str, int]] = []
        if config.root is not None:
            filesystem, root = open_uri(config.root, "data.root")
            infos = files_at(filesystem, root, config, Account())  # the source has reported the others
            files = sorted((info.path.removeprefix(root), info.size) for info in infos)
        items, labels = own.table.get()
        digest = _digest(files, items.tobytes(), labels.tobytes())
        texts, numbers = distinct(labels, names, config.label_separator)
        own = dataclasses.replace(own, table=Shared((items, numbers)))
        return Inputs(_kept(own), texts, digest, found.bad, found.excluded, found.digest)
    images, labels = _arrays(found.datasets[split])
    texts, numbers = distinct(labels, found.info.class_names, config.label_separator)
    table = Shared((np.arange(len(labels)), numbers))
    own = IndexedSplit(len(labels), ArrayReader(f"{config.name}/{split}", Shared(images)), table, None)
    return Inputs(own, texts, _digest([], images.tobytes(), labels.tobytes()))


def _arrays(dataset: Any) -> tuple[UInt8s, Labels]:
    rows = CachedRows(dataset.iterator())
    if not len(rows):
        return np.empty(0, np.uint8), np.empty(0, np.int64)
    taken = rows.take(np.arange(len(rows)))
    return taken.images, taken.labels


@dataclass(frozen=True)
class ArrayReader:
    """Reader of images from an array in memory."""

    name: str
    images: Shared[UInt8s]

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield a name and a function that returns the image, for each item."""
        images = self.images.get()
        for item in items.tolist():
            yield f"{self.name}/{item}", functools.partial(images.__getitem__, item)


@every_image.register("image_folder")
def _directory(config: DataConfig, class_names: list[str]) -> Inputs:
    """Return every image file below data.root, in class directories or not."""
    import pyarrow as pa

    filesystem, root = open_uri(config.root or "", "data.root")
    account = Account()
    files = sorted((parts, size) for parts, size in image_files(filesystem, root, config, account) if parts)
    known = set(class_names)
    classes = [next((part for part in parts[:-1] if part in known), None) for parts, _ in files]
    paths = ["/".join(parts) for parts, _ in files]
    reader = FileReader(filesystem, root, Shared(pa.array(paths, pa.large_string())))
    digest = _digest(zip(paths, (size for _, size in files), strict=True))
    return _inputs(reader, classes, digest, account)


@every_image.register("image_list")
def _list(config: DataConfig, _: list[str]) -> Inputs:
    """Return every row, whatever its split."""
    import pyarrow as pa

    listed = read_list(config, labelled=False)
    labels = _as_labels(listed.labels or [None] * len(listed.paths), config)
    reader = FileReader(listed.filesystem, listed.directory, Shared(pa.array(listed.paths, pa.large_string())))
    return _inputs(reader, labels, _digest(((path, 0) for path in listed.paths), repr(labels).encode()))


@every_image.register("parquet")
def _parquet(config: DataConfig, _: list[str]) -> Inputs:
    """Return every row of every file."""
    import pyarrow as pa

    filesystem, root = open_uri(config.root or "", "data.root")
    account = Account()
    infos = data_files(filesystem, root, config, ".parquet", account)
    labels: list[Any] = []
    groups: list[RowGroup] = []
    for info in infos:
        try:
            found = list(labels_of(filesystem, info.path, config, labelled=False))
        except (OSError, pa.ArrowException) as error:
            account.add_bad(info.path, f"{type(error).__name__}: {error}")
            continue
        for number, values in enumerate(found):
            groups.append(RowGroup(info.path, number, len(labels)))
            labels += values
    reader = BlockReader(RowGroups(filesystem, config.image_column, Shared(groups)))
    cells = labels if config.task == SINGLE_LABEL else _as_labels(labels, config)
    return _inputs(reader, cells, _digest((info.path.removeprefix(root), info.size) for info in infos), account)


@every_image.register("webdataset")
def _webdataset(config: DataConfig, _: list[str]) -> Inputs:
    """Return every image of every shard."""
    filesystem, root = open_uri(config.root or "", "data.root")
    account = Account()
    infos = data_files(filesystem, root, config, ".tar", account)
    stretches, labels, of_shards = scan_shards(
        filesystem, [info.path for info in infos], labelled=False, endings=label_endings(config)
    )
    account.add(of_shards)
    digest = _digest((info.path.removeprefix(root), info.size) for info in infos)
    return _inputs(BlockReader(stretches), _as_labels(labels, config), digest, account)


def _inputs(reader: Reader, labels: Sequence[Any], digest: str, account: Account | None = None) -> Inputs:
    """Return inputs with numbered labels; None or "" means no label."""
    written = [None if label in (None, "") else str(label) for label in labels]
    names = sorted({label for label in written if label is not None})
    numbers: dict[str | None, int] = {None: _NONE, **{name: number for number, name in enumerate(names)}}
    table = Shared((np.arange(len(written)), np.array([numbers[label] for label in written], np.int64)))
    account = account or Account()
    split = IndexedSplit(len(written), reader, table, None)
    return Inputs(_kept(split), names, digest, account.bad, account.excluded)


def _as_labels(cells: Sequence[Any], config: DataConfig) -> list[str | int | None]:
    """Return labels from text: digits as numbers, as in training; for other tasks, the cells' text."""
    if config.task != SINGLE_LABEL:
        return [cell_text(cell, config) for cell in cells]
    return [None if text is None else written_number(text, config) for text in cells]


def _kept(split: IndexedSplit) -> IndexedSplit:
    """Return the split with a cache of blocks if it is read in blocks."""
    if not isinstance(split.read, BlockReader):
        return split
    return IndexedSplit(split.num_samples, split.read.with_cache(_BLOCKS_KEPT), split.table, split.block_sizes)


def _digest(files: Iterable[tuple[str, int]], *more: bytes) -> str:
    """Return a digest of paths and sizes in bytes, in this order."""
    digest = hashlib.sha256()
    for path, size in files:
        digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
    for content in more:
        digest.update(content)
    return digest.hexdigest()
