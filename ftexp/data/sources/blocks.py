"""Samples that can only be read with their neighbours: row groups of parquet, stretches of a tar file."""

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

# CPUs that reading a block takes: Ray starts a process for each that it finds room for. Tasks that decode give
# their CPU back while they wait for a block.
_READ_CPUS = 0.5


class BlockSource(Protocol):
    """How one kind of file is read in blocks; pickled into every task that reads."""

    def first_items(self) -> Int64s:
        """Return the first item of each block, ascending."""
        ...

    def fetch(self, block: int) -> Any:
        """Read a whole block: something that Ray's object store holds well. OSError and the like if it can't be."""
        ...

    def pick(self, data: Any, block: int, row: int) -> Raw:
        """Return the entry of one row of what `fetch` gave."""
        ...

    def where(self, block: int, row: int) -> str:
        """Describe a row."""
        ...


class BlockCache:
    """Blocks in the object store, each read once for all tasks, and the least recently used dropped. An actor."""

    def __init__(self, fetch: Callable[[int], Any], capacity: int) -> None:
        self._fetch, self._capacity = fetch, capacity
        self._read = ray.remote(num_cpus=_READ_CPUS, scheduling_strategy="SPREAD")(_fetched)
        self._refs: OrderedDict[int, ray.ObjectRef] = OrderedDict()

    def refs(self, blocks: list[int]) -> list[ray.ObjectRef]:
        """Return references to blocks, reading those that aren't there."""
        for block in blocks:
            if block not in self._refs:
                self._refs[block] = self._read.remote(self._fetch, block)
            self._refs.move_to_end(block)
        found = [self._refs[block] for block in blocks]
        while len(self._refs) > max(self._capacity, len(blocks)):
            self._refs.popitem(last=False)
        return found

    def forget(self, block: int) -> None:
        """Read it again when it is next asked for."""
        self._refs.pop(block, None)


def _fetched(fetch: Callable[[int], Any], block: int) -> Any:
    """Return the block, or the exception that kept it from being read.

    As a value, so that Ray doesn't wrap or retry it.
    """
    try:
        return fetch(block)
    except Exception as error:  # whatever a file format raises on a corrupt file; it becomes a bad sample
        return error


@dataclass(frozen=True)
class BlockReader:
    """Reads items by way of their blocks. `cache` is the handle of a BlockCache; None: read here, and forget."""

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
        """Return the same, sharing what is read: this window of blocks and the next one."""
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
