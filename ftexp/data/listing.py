"""Listings of file sources: samples that can be read by number, on any node and in any order.

A `Listing` is what was found; an `IndexedSplit` is one split of it, ready to be sent to the tasks that decode.
Items are numbered as they were listed, samples as they are in their split.
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

_RETRY_AFTER_S = (0.2, 1.0, 3.0)  # a store that fails is asked again


@dataclass(frozen=True)
class Listing:
    """Samples that a file source found, by listed split: train, and val and test if the source has them."""

    class_names: list[str]
    labels: dict[str, Labels]  # labels of each item
    readers: dict[str, Reader]
    # items that `readers` read together, in stretches of this many; none: each by itself
    block_sizes: dict[str, Int64s] = field(default_factory=dict)
    single_readers: dict[str, Reader] = field(default_factory=dict)  # that read each by itself, where it is possible
    bad: list[BadSample] = field(default_factory=list)  # found unreadable while listing
    digest: str | None = None  # `digest_of` it; None: not known, and other samples go unnoticed if they are as many
    excluded: list[Excluded] = field(default_factory=list)  # entries that a rule keeps from being samples

    def splits(self, config: DataConfig, readers: Mapping[str, Reader]) -> dict[str, IndexedSplit]:
        """Return every split, read by `readers`.

        What the source has no split for is cut off from train as `config` says.
        """
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
        """Return what `DataInfo` takes over of it."""
        labels = {name: split.table.get()[1] for name, split in splits.items()}
        return {
            "bad_samples": self.bad,
            "digest": self.digest,
            "excluded": self.excluded,
            "warnings": [*class_warnings(self.class_names, labels), *self._empty_splits(config, labels)],
            **target_facts(config, labels["train"]),
        }

    def _empty_splits(self, config: DataConfig, labels: Mapping[str, Labels]) -> Iterator[str]:
        """Warn of splits that were to be cut off from train, and got no sample: each class is rounded by itself."""
        for name in ("val", "test"):
            fraction = getattr(config, f"{name}_fraction")
            if name not in self.labels and fraction > 0 and not len(labels[name]):
                yield (
                    f"{name} has no samples: data.{name}_fraction={fraction} of each class, rounded, is none; raise "
                    "it, or set it to 0"
                )


def digest_of(class_names: list[str], labels: dict[str, Labels], names: Mapping[str, Iterable[str]]) -> str:
    """Return the SHA-256 of the list of samples, in order, and of their labels; not of their content.

    `names` are each split's, below the root, so that data may move.
    """
    found = hashlib.sha256(json.dumps(class_names).encode())
    for split, numbers in sorted(labels.items()):
        listed = "\0".join(names[split]).encode()
        found.update(f"{split} {len(numbers)} {len(listed)} ".encode() + numbers.tobytes() + listed)
    return found.hexdigest()


def retried(get: Callable[[], T]) -> T:
    """Get again what a store failed to give, for some seconds; what isn't there, or is forbidden, fails at once.

    Raises:
        FileNotFoundError, NotADirectoryError: it was listed, and is gone now.
        PermissionError: of a local disk; a store's refusal is a plain OSError.
        OSError: of the last try.
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
    """A file of a store that may fail for a while, for formats whose library reads it.

    The bytes are what is got again: what a library makes of them, of a corrupt file say, is an OSError too.
    """

    def __init__(self, filesystem: FileSystem, path: str) -> None:
        """Raise FileNotFoundError if it isn't there; OSError if it can't be opened."""
        self._file = retried(lambda: filesystem.open_input_file(path))
        self._size, self._position = self._file.size(), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return where the next read begins, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset`, counted from where `whence` says."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read on. OSError of the last try."""
        found = retried(lambda: self._file.read_at(len(buffer), self._position))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        """Close the file below, too."""
        self._file.close()
        super().close()


def raiser(error: Exception) -> Callable[[], Any]:
    """Return a way to get an image that can't be got."""

    def get() -> Any:
        raise error

    return get
