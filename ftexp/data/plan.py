"""Which positions a rank handles in a step: its share of the global batch, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftexp.data.order import Int64s

# A micro-batch never has fewer rows: batch norm can't train on one. Rows that fill up weigh nothing.
_MIN_ROWS = 2


@dataclass(frozen=True)
class MicroShare:
    """Positions of a micro-batch: those that count, then padding, then partners of the former."""

    positions: Int64s
    num_counted: int
    num_partners: int = 0

    def pairs(self, start: int, readable: npt.NDArray[np.bool_] | None) -> Int64s:
        """Return rows of samples that are partners, [2, pairs], the earlier first; `start` is that of the global batch.

        Rows that fill up have no partner, nor has what isn't `readable` (None: all is).
        """
        count = len(self.positions)
        rows = np.concatenate([np.arange(self.num_counted), np.arange(count - self.num_partners, count)])
        if readable is not None:
            rows = rows[readable[rows]]
        rows = rows[np.argsort(self.positions[rows])]
        offsets = self.positions[rows] - start
        here = np.flatnonzero((offsets[:-1] % 2 == 0) & (np.diff(offsets) == 1))
        return np.stack([rows[here], rows[here + 1]])


@dataclass(frozen=True)
class ShardPlan:
    """Which positions a rank handles. The global batches depend on the batch size alone, never on the ranks."""

    global_batch_size: int
    accumulate_steps: int
    total_positions: int
    rank: int
    world_size: int
    in_pairs: bool = False  # whether each sample needs its partner at hand, to be mixed with it

    def batch_ends(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of every global batch from `position`; the last may be short."""
        for start in range(position, self.total_positions, self.global_batch_size):
            yield start, min(start + self.global_batch_size, self.total_positions)

    def share(self, start: int, end: int) -> tuple[int, int]:
        """Return this rank's (start, end) within a global batch; shares differ by one at most."""
        return even_part(start, end, self.rank, self.world_size)

    def micro_shares(self, start: int, end: int) -> list[MicroShare]:
        """Return this rank's share of a global batch, cut into micro-batches."""
        first, last = self.share(start, end)
        shares = []
        for number in range(self.accumulate_steps):
            low, high = even_part(first, last, number, self.accumulate_steps)
            parts = [np.arange(low, high)]
            if (lacking := _MIN_ROWS - (high - low)) > 0:
                parts.append(start + np.arange(lacking) % (end - start))
            partners = cut_off(low, high, start, end) if self.in_pairs else []
            parts.append(np.array(partners, np.int64))
            shares.append(MicroShare(np.concatenate(parts), high - low, len(partners)))
        return shares


def even_part(start: int, end: int, part: int, parts: int) -> tuple[int, int]:
    """Cut [start, end) into contiguous parts whose sizes differ by one at most, the longer ones first."""
    size, longer = divmod(end - start, parts)
    first = start + part * size + min(part, longer)
    return first, first + size + (part < longer)


def cut_off(low: int, high: int, start: int, end: int) -> list[int]:
    """Return partners of [low, high) that lie outside of it, within the global batch [start, end): two at most.

    Samples are partners by twos from the global batch's beginning; where their number is odd, the last has none.
    """
    before = [low - 1] if low < high and (low - start) % 2 else []
    return before + ([high] if low < high < end and (high - start) % 2 else [])
