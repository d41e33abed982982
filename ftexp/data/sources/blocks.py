"""Reading of samples in blocks: row groups of parquet files, ranges of tar files."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray

from ftexp.data.info import Raw
from ftexp.data.listing import raiser
from ftexp.data.order import Int64s

# CPUs reserved by a task that reads a block; they limit the number of processes that Ray starts. Decoding tasks release
# their CPU while they wait for a block.
_READ_CPUS = 0.5


class BlockSource(Protocol):
    """Reads one kind of file in blocks; pickled into every reading task."""

    def first_items(self) -> Int64s:
        """Return the first item of each block, in ascending order."""
        ...

    def fetch(self, block: int) -> Any:
        """Read a whole block, in a form suited to Ray's object store. OSError and the like if it can't be read."""
        ...

    def pick(self, data: Any, block: int, row: int) -> Raw:
        """Return the entry of one row. data: result of `fetch`."""
        ...

    def where(self, block: int, row: int) -> str:
        """Return the location of a row, for messages."""
        ...


class BlockCache:
    """An actor that keeps recently used blocks in the object store, so that each is read once for all tasks."""

    def __init__(self, fetch: Callable[[int], Any], capacity: int) -> None:
        self._fetch, self._capacity = fetch, capacity
        self._read = ray.remote(num_cpus=_READ_CPUS, scheduling_strategy="SPREAD")(_fetched)
        self._refs: OrderedDict[int, ray.ObjectRef] = OrderedDict()

    def refs(self, blocks: list[int]) -> list[ray.ObjectRef]:
        """Return references to blocks; blocks that aren't in the cache are read."""
        for block in blocks:
            if block not in self._refs:
                self._refs[block] = self._read.remote(self._fetch, block)
            self._refs.move_to_end(block)
        found = [self._refs[block] for block in blocks]
        while len(self._refs) > max(self._capacity, len(blocks)):
            self._refs.popitem(last=False)
        return found

    def forget(self, block: int) -> None:
        """Remove a block, so that it is read again at the next request."""
        self._refs.pop(block, None)


def _fetched(fetch: Callable[[int], Any], block: int) -> Any:
    """Return the block, or the exception that reading it raised, as a value, so that Ray doesn't wrap or retry it."""
    try:
        return fetch(block)
    except Exception as error:  # whatever a file format raises on a corrupt file; it becomes a bad sample
        return error


@dataclass(frozen=True)
class BlockReader:
    """Reads items through their blocks. cache: handle of a BlockCache; None: blocks are read here and not kept."""

    source: BlockSource
    cache: Any = None

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield an entry for each item, in this order."""
        firsts = self.source.first_items()
        blocks = np.searchsorted(firsts, items, side="right") - 1
        wanted = [int(block) for block in np.unique(blocks)]
        data = dict(zip(wanted, self._get(wanted), strict=True))
        for item, block in zip(items.tolist(), blocks.tolist(), strict=True):
            row = item - int(firsts[block])
            if isinstance(data[block], Exception):
                yield self.source.where(block, row), raiser(data[block])
            else:
                yield self.source.pick(data[block], block, row)

    def with_cache(self, window: int) -> BlockReader:
        """Return the same reader with a shared cache, for the blocks of the current window and the next one."""
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(BlockCache)
        return dataclasses.replace(self, cache=actor.remote(self.source.fetch, 2 * window + 1))

    def _get(self, blocks: list[int]) -> list[Any]:
        if self.cache is None:
            return [_fetched(self.source.fetch, block) for block in blocks]
        found = ray.get(ray.get(self.cache.refs.remote(blocks)))
        for block, data in zip(blocks, found, strict=True):
            if isinstance(data, Exception):
                self.cache.forget.remote(block)
        return list(found)
