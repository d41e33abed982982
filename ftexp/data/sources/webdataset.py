"""The source webdataset: tar shards as in github.com/webdataset/webdataset, with samples 000123.jpg and 000123.cls."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray

from ftexp.config.schema import SINGLE_LABEL, DataConfig
from ftexp.data.info import Raw, Reader, reasons
from ftexp.data.label_cells import as_labels
from ftexp.data.listing import Listing, digest_of, retried
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.data.sources.blocks import BlockReader
from ftexp.data.sources.entries import Account, path_exclusion
from ftexp.data.sources.named_files import files_by_split
from ftexp.data.sources.registry import register_source
from ftexp.errors import DataError
from ftexp.storage.directory import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")
_LABEL = "cls"
_LISTS = "json"  # ending of files with a list of labels or numbers
_BLOCK_BYTES = 32 * 2**20  # bytes of a shard that are read at once


class Entry(NamedTuple):
    """A sample of a shard."""

    name: str
    offset: int  # offset of the image in the shard, in bytes
    num_bytes: int
    label: str


@register_source("webdataset")
def webdataset(config: DataConfig) -> Listing:
    """Index uncompressed tar shards whose samples have an image and a .cls file (an integer, or text).

    If data.task allows several labels or numbers, they may also be in a .json file with a list or one number. A .cls
    file of the same sample takes precedence.

    Shards named train*, val* and test* (or in such directories) form splits if there is a train*. Every shard is read
    once for its index: on a local disk only its headers, from an object store all of it.
    """
    filesystem, root = open_uri(config.root or "", "data.root")
    account = Account()
    texts: dict[str, list[str]] = {}
    readers: dict[str, Reader] = {}
    single: dict[str, Reader] = {}
    block_sizes: dict[str, Int64s] = {}
    names: dict[str, list[str]] = {}
    for split, paths in files_by_split(filesystem, root, config, ".tar", account).items():
        stretches, found, of_shards = scan_shards(filesystem, paths, endings=label_endings(config))
        account.add(of_shards)
        texts[split] = found
        names[split] = stretches.names(root)
        readers[split], single[split] = BlockReader(stretches), EntryReader(stretches)
        block_sizes[split] = np.diff(np.append(stretches.first_items(), len(found)))
    if account.bad and config.on_bad_sample == "fail":
        raise DataError(
            f"{len(account.bad)} problems with the shards of data.root={config.root}; fix them, or exclude bad "
            "samples with data.on_bad_sample=skip:" + reasons([], account.bad)
        )
    class_names, labels = as_labels(
        texts,
        config,
        f"data.root={config.root}: .{' or .'.join(label_endings(config))}",
        lambda split, item: f"{root}{names[split][item]}",
    )
    digest = digest_of(class_names, labels, names)
    return Listing(class_names, labels, readers, block_sizes, single, account.bad, digest, account.excluded)


def label_endings(config: DataConfig) -> tuple[str, ...]:
    """Return the endings of entries with labels."""
    return (_LABEL,) if config.task == SINGLE_LABEL else (_LABEL, _LISTS)


def scan_shards(
    filesystem: FileSystem, paths: list[str], labelled: bool = True, endings: tuple[str, ...] = (_LABEL,)
) -> tuple[Stretches, list[str], Account]:
    """Return the samples of shards as blocks, their labels, and an account of other entries. Each shard has a task.

    labelled: whether a sample needs a label; otherwise a missing label is "". endings: endings of entries with labels.
    """
    import pyarrow as pa

    scan = ray.remote(scan_shard)
    shards = ray.get([scan.remote(filesystem, path, labelled, endings) for path in paths])
    entries = [(number, entry) for number, (found, _) in enumerate(shards) for entry in found]
    account = Account()
    for _, of_shard in shards:
        account.add(of_shard)
    index = Index(
        paths,
        pa.array([entry.name for _, entry in entries], pa.large_string()),
        np.array([shard for shard, _ in entries], np.int64),
        np.array([entry.offset for _, entry in entries], np.int64),
        np.array([entry.num_bytes for _, entry in entries], np.int64),
    )
    stretches = Stretches(filesystem, Shared(index), Shared(index.cut(_BLOCK_BYTES)))
    return stretches, [label for _, (*_, label) in entries], account


def scan_shard(
    filesystem: FileSystem, path: str, labelled: bool = True, endings: tuple[str, ...] = (_LABEL,)
) -> tuple[list[Entry], Account]:
    """Return the samples of a shard, in order, and an account of its other entries."""
    try:
        return retried(lambda: _scan(filesystem, path, labelled, endings))
    except (OSError, tarfile.TarError) as error:
        account = Account()
        account.add_bad(path, f"{type(error).__name__}: {error}")
        return [], account


def _scan(filesystem: FileSystem, path: str, labelled: bool, endings: tuple[str, ...]) -> tuple[list[Entry], Account]:
    from pyarrow.fs import LocalFileSystem

    label_files = " or .".join(endings)
    other = f"neither an image nor .{label_files}"
    local = isinstance(filesystem, LocalFileSystem)
    account = Account()
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    lists: dict[str, str] = {}
    spoilt: dict[str, str] = {}  # name of a bad sample -> reason
    truncated = None
    with (
        filesystem.open_input_file(path) if local else filesystem.open_input_stream(path, buffer_size=2**20) as file,
        tarfile.open(fileobj=file, mode="r:" if local else "r|") as tar,
    ):
        size = file.size() if local else None
        try:
            for member in tar:
                if member.isdir():
                    continue
                name, ending = _split_name(member.name, (*_IMAGES, *endings))
                hidden = path_exclusion(PurePosixPath(member.name).parts)
                if hidden is not None or ending is None:
                    account.exclude(f"{path} {member.name}", hidden[1] if hidden is not None else other)
                elif not member.isfile():
                    spoilt[name] = f"its .{ending} is a link: pack it with tar --dereference --hard-dereference"
                elif ending in _IMAGES and name in images:
                    spoilt[name] = "it has more than one image"
                elif ending in _IMAGES:
                    images[name] = (member.offset_data, member.size)
                else:
                    content = tar.extractfile(member)
                    assert content is not None, "it is a file"
                    label = content.read().decode(errors="replace").strip()
                    if (lists if ending == _LISTS else labels).setdefault(name, label) != label:
                        spoilt[name] = f"it has more than one .{ending}"
        except tarfile.ReadError as error:  # the shard is truncated; earlier entries are complete
            if not images:
                raise
            truncated = f"{type(error).__name__}: {error}"
            # in a stream, it isn't known whether the last entry was read to its end
            if size is None or (labelled and (name in images) != (name in labels or name in lists)):
                images.pop(name, None)
                labels.pop(name, None)
                lists.pop(name, None)
    end = max((offset + num_bytes for offset, num_bytes in images.values()), default=0)
    if size is not None and end > size:
        truncated = f"it ends at {size} bytes, within an image"
    if truncated is not None:
        account.add_bad(path, f"{truncated}; what comes before is kept")
    for name, text in lists.items():
        if name in labels:
            account.exclude(f"{path} {name}.{_LISTS}", f".{_LISTS} next to a .{_LABEL}, which takes precedence")
            continue
        labels[name] = text
        if not _holds_labels(text):
            spoilt.setdefault(name, f"its .{_LISTS} holds neither a list nor a number")
    samples = images.keys() & labels.keys() if labelled else set(images)
    for name in sorted(images.keys() ^ labels.keys()):
        if (own := _before_dot(name)) != name and own in samples:
            account.exclude(f"{path} {name}", "further field of a sample")
            images.pop(name, None)
            labels.pop(name, None)
    if not labelled:
        labels = dict.fromkeys(images, "") | labels
    for name in sorted((images.keys() ^ labels.keys()) - spoilt.keys()):
        account.add_bad(f"{path} {name}", "it has no ." + (label_files if name in images else "image"))
    for name in (name for name, label in labels.items() if "\N{REPLACEMENT CHARACTER}" in label):
        spoilt.setdefault(name, f"its .{label_files} is no text")
    for name, reason in spoilt.items():
        account.add_bad(f"{path} {name}", reason)
        images.pop(name, None)
    whole = (name for name in images if name in labels and (size is None or sum(images[name]) <= size))
    return [Entry(name, *images[name], labels[name]) for name in whole], account


def _holds_labels(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, (list, int, float)) and not isinstance(found, bool)


def _split_name(path: str, endings: tuple[str, ...]) -> tuple[str, str | None]:
    """Return (name of the entry's sample, ending in lower case, or None if it is not one of `endings`).

    The name of a sample may contain dots, so only a known ending is removed; for other entries, everything from the
    first dot.
    """
    directory, _, base = path.rpartition("/")
    stem, _, ending = base.rpartition(".")
    known = bool(stem) and ending.lower() in endings
    name = stem if known else base.partition(".")[0]
    return f"{directory}/{name}" if directory and name else name, ending.lower() if known else None


def _before_dot(name: str) -> str:
    """Return the sample's name if the first dot in `name` starts a field, as in 7.left.png."""
    directory, slash, base = name.rpartition("/")
    return f"{directory}{slash}{base.partition('.')[0]}"


@dataclass(frozen=True)
class Index:
    """Location of each item; the columns are indexed by item."""

    paths: list[str]  # paths of the shards
    names: Any  # pyarrow array of large_string
    shards: Int64s
    offsets: Int64s
    num_bytes: Int64s

    def cut(self, block_bytes: int) -> Int64s:
        """Return the first items of ranges of about `block_bytes`, none of which spans two shards."""
        firsts: list[int] = []
        start = 0
        for item in range(len(self.names)):
            if not firsts or self.shards[item] != self.shards[item - 1] or self.offsets[item] - start >= block_bytes:
                firsts.append(item)
                start = int(self.offsets[item])
        return np.array(firsts, np.int64)


@dataclass(frozen=True)
class Stretches:
    """Ranges of shards, as blocks."""

    filesystem: FileSystem
    index: Shared[Index]
    firsts: Shared[Int64s]

    def first_items(self) -> Int64s:
        """Return the first item of each range."""
        return self.firsts.get()

    def names(self, root: str) -> list[str]:
        """Return each sample's shard, relative to `root`, and its name in the shard."""
        index = self.index.get()
        pairs = zip(index.shards.tolist(), index.names.to_pylist(), strict=True)
        return [f"{index.paths[shard].removeprefix(root)} {name}" for shard, name in pairs]

    def fetch(self, block: int) -> Any:
        """Return the bytes from the start of a range's first image to the end of its last."""
        index, firsts = self.index.get(), np.append(self.firsts.get(), len(self.index.get().names))
        first, last = int(firsts[block]), int(firsts[block + 1]) - 1
        start = int(index.offsets[first])
        return self.read(first, start, int(index.offsets[last] + index.num_bytes[last]) - start)

    def read(self, item: int, offset: int, num_bytes: int) -> bytes:
        """Return bytes of the shard with this item."""
        index = self.index.get()
        path = index.paths[index.shards[item]]

        def read() -> bytes:
            with self.filesystem.open_input_file(path) as file:
                found = bytes(file.read_at(num_bytes, offset))
            if len(found) != num_bytes:
                raise ValueError(f"{path} has become shorter")
            return found

        return retried(read)

    def pick(self, data: Any, block: int, row: int) -> Raw:
        """Return an image from a range's bytes."""
        index, first = self.index.get(), int(self.firsts.get()[block])
        start = int(index.offsets[first + row] - index.offsets[first])
        view = memoryview(data)[start : start + int(index.num_bytes[first + row])]
        return self.where(block, row), view.tobytes

    def where(self, block: int, row: int) -> str:
        """Return the shard and the sample's name."""
        return self.where_item(int(self.firsts.get()[block]) + row)

    def where_item(self, item: int) -> str:
        """Return the shard and the sample's name."""
        index = self.index.get()
        return f"{index.paths[index.shards[item]]} {index.names[item]}"


@dataclass(frozen=True)
class EntryReader:
    """Reads samples one by one: an uncompressed tar file can be read at any offset."""

    stretches: Stretches

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield each sample's location and a function that reads it."""
        index = self.stretches.index.get()
        for item in items.tolist():
            yield self.stretches.where_item(item), self._reader(index, item)

    def _reader(self, index: Index, item: int) -> Callable[[], bytes]:
        return lambda: self.stretches.read(item, int(index.offsets[item]), int(index.num_bytes[item]))
