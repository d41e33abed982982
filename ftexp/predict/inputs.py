"""The images that predictions are made for, in a fixed order. They need no labels. Ray must be running."""

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

ALL = "all"  # all splits: every image there is, with a label or without
_NONE = -1  # the label of an image whose class isn't known
_BLOCKS_KEPT = 1  # a window of blocks, as BlockReader counts them: samples are read in the order of their files


@dataclass(frozen=True)
class Inputs:
    """Samples 0 to len(split) - 1, as tasks read them; a label of -1 says that the class isn't known."""

    split: IndexedSplit
    label_names: list[str]
    digest: str  # digest of the images' paths and file sizes
    bad: list[BadSample] = field(default_factory=list)  # files with an unknown number of images
    excluded: list[Excluded] = field(default_factory=list)  # entries that a rule keeps from being images
    listing: str | None = None  # the digest of all splits together, as a run has it; None: not known


def find_inputs(config: DataConfig, split: str, class_names: list[str]) -> Inputs:
    """Look for the images that `config` names; DataError if there is none.

    Args:
        config: the data; samples that can't be read must be skipped, as it says.
        split: train, val or test, as training would cut them; or all.
        class_names: of the model. A directory of one of these names is the class of its images.
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
            infos = files_at(filesystem, root, config, Account())  # the source has accounted for the others
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
    """Reads images that are in memory as a whole."""

    name: str
    images: Shared[UInt8s]

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield a number for a place, and how to get it."""
        images = self.images.get()
        for item in items.tolist():
            yield f"{self.name}/{item}", functools.partial(images.__getitem__, item)


@every_image.register("image_folder")
def _directory(config: DataConfig, class_names: list[str]) -> Inputs:
    """Return every image file below data.root; in class directories, or not."""
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
    """Return inputs with labels as training takes them; None or "": no label."""
    written = [None if label in (None, "") else str(label) for label in labels]
    names = sorted({label for label in written if label is not None})
    numbers: dict[str | None, int] = {None: _NONE, **{name: number for number, name in enumerate(names)}}
    table = Shared((np.arange(len(written)), np.array([numbers[label] for label in written], np.int64)))
    account = account or Account()
    split = IndexedSplit(len(written), reader, table, None)
    return Inputs(_kept(split), names, digest, account.bad, account.excluded)


def _as_labels(cells: Sequence[Any], config: DataConfig) -> list[str | int | None]:
    """Return labels of a source of text, where training reads digits as numbers; or of several labels."""
    if config.task != SINGLE_LABEL:
        return [cell_text(cell, config) for cell in cells]
    return [None if text is None else written_number(text, config) for text in cells]


def _kept(split: IndexedSplit) -> IndexedSplit:
    """Return the same, where neighbouring tasks share the blocks that they read."""
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
