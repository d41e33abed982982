"""Listings of file sources, whose samples can be read by number, on any node and in any order.

A `Listing` holds what a source found; an `IndexedSplit` is one split of it, ready to be sent to decoding tasks. Items
are numbered in the order of the listing, samples in the order of their split.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ftexp.config.schema import DataConfig
from ftexp.data.info import SPLITS, BadSample, Excluded, IndexedSplit, Reader
from ftexp.data.labels import class_warnings
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.data.stratify import stratified_split
from ftexp.data.targets import Labels, target_facts

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

T = TypeVar("T")

_RETRY_AFTER_S = (0.2, 1.0, 3.0)  # delays before retries of a failed request to a store


@dataclass(frozen=True)
class Listing:
    """Samples that a file source found, by listed split: train, and val and test if the source has them."""

    class_names: list[str]
    labels: dict[str, Labels]  # label of each item
    readers: dict[str, Reader]
    # sizes of the blocks of items that `readers` read at once; {}: items are read one by one
    block_sizes: dict[str, Int64s] = field(default_factory=dict)
    single_readers: dict[str, Reader] = field(default_factory=dict)  # read items one by one, if the source can
    bad: list[BadSample] = field(default_factory=list)  # found unreadable while listing
    digest: str | None = None  # see `digest_of`; None: only changes of the number of samples are noticed
    excluded: list[Excluded] = field(default_factory=list)  # entries that a rule excludes

    def splits(self, config: DataConfig, readers: Mapping[str, Reader]) -> dict[str, IndexedSplit]:
        """Return every split, read by `readers`; val and test are split off from train if the source lacks them."""
        missing = [name for name in ("val", "test") if name not in self.labels]
        fractions = [getattr(config, f"{name}_fraction") for name in missing]
        rest, *cut = stratified_split(self.labels["train"], fractions, config.split_seed)
        chosen = {name: (name, np.arange(len(labels))) for name, labels in self.labels.items() if name != "train"}
        chosen |= {name: ("train", part) for name, part in zip(missing, cut, strict=True)}
        chosen["train"] = ("train", rest)
        splits = {}
        for name in SPLITS:
            listed, items = chosen[name]
            blocks = self.block_sizes.get(listed)
            sizes = (
                None if blocks is None else np.diff(np.searchsorted(items, np.concatenate([[0], np.cumsum(blocks)])))
            )
            table = Shared((items, self.labels[listed][items]))
            splits[name] = IndexedSplit(len(items), readers[listed], table, sizes)
        return splits

    def facts(self, config: DataConfig, splits: dict[str, IndexedSplit]) -> dict[str, Any]:
        """Return the fields of `DataInfo` that come from the listing."""
        labels = {name: split.table.get()[1] for name, split in splits.items()}
        return {
            "bad_samples": self.bad,
            "digest": self.digest,
            "excluded": self.excluded,
            "warnings": [*class_warnings(self.class_names, labels), *self._empty_splits(config, labels)],
            **target_facts(config, labels["train"]),
        }

    def _empty_splits(self, config: DataConfig, labels: Mapping[str, Labels]) -> Iterator[str]:
        """Yield a warning for each split from train that got no samples, since each class is rounded separately."""
        for name in ("val", "test"):
            fraction = getattr(config, f"{name}_fraction")
            if name not in self.labels and fraction > 0 and not len(labels[name]):
                yield (
                    f"{name} has no samples: data.{name}_fraction={fraction} of each class, rounded, is none; raise "
                    "it, or set it to 0"
                )


def digest_of(class_names: list[str], labels: dict[str, Labels], names: Mapping[str, Iterable[str]]) -> str:
    """Return the SHA-256 of the samples' names and labels, in order; it doesn't cover their content.

    names: of each split's samples, relative to the root, so that the data may be moved.
    """
    found = hashlib.sha256(json.dumps(class_names).encode())
    for split, numbers in sorted(labels.items()):
        listed = "\0".join(names[split]).encode()
        found.update(f"{split} {len(numbers)} {len(listed)} ".encode() + numbers.tobytes() + listed)
    return found.hexdigest()


def retried(get: Callable[[], T]) -> T:
    """Call `get`, with retries for some seconds if a store fails; missing or forbidden files fail immediately.

    Raises:
        FileNotFoundError, NotADirectoryError: the file no longer exists.
        PermissionError: on a local disk; a store raises a plain OSError instead.
        OSError: the error of the last attempt.
    """
    for delay_s in _RETRY_AFTER_S:
        try:
            return get()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise
        except OSError:
            time.sleep(delay_s)
    return get()


class SteadyFile(io.RawIOBase):
    """A file that retries reads of a store that may fail for a while; for libraries that read from file objects.

    Only reads of bytes are retried: a library's own errors, for example about a corrupt file, are OSErrors too.
    """

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        """Open the file; FileNotFoundError if it doesn't exist, OSError if it can't be opened."""
        self._file = retried(lambda: filesystem.open_input_file(path))
        self._size, self._position = self._file.size(), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position of the next read, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position to `offset` bytes, relative to `whence`."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into `buffer`; OSError if all attempts fail."""
        found = retried(lambda: self._file.read_at(len(buffer), self._position))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        """Close this object and the underlying file."""
        self._file.close()
        super().close()


def raiser(error: Exception) -> Callable[[], Any]:
    """Return a function that raises `error`, for an image that can't be read."""

    def get() -> Any:
        raise error

    return get
