"""A rank's positions in a step: its share of the global batch, divided into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ftexp.data.order import Int64s

# minimum number of rows in a micro-batch, since batch norm can't train on one row; padding rows have weight 0
_MIN_ROWS = 2


@dataclass(frozen=True)
class MicroShare:
    """Positions of a micro-batch: those that count, then padding, then partners of those that count."""

    positions: Int64s
    num_counted: int
    num_partners: int = 0

    def pairs(self, start: int, readable: npt.NDArray[np.bool_] | None) -> Int64s:
        """Return the rows of partners, [2, pairs], the earlier position first.

        start: start of the global batch. readable: [rows]; None: all. Padding and unreadable rows have no partner.
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
    """The positions of a rank. Global batches depend only on the batch size, not on the number of ranks."""

    global_batch_size: int
    accumulate_steps: int
    total_positions: int
    rank: int
    world_size: int
    in_pairs: bool = False  # whether each micro-batch must include its samples' partners, for mixing

    def batch_ends(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield the (start, end) of every global batch from `position`; the last batch may be smaller."""
        for start in range(position, self.total_positions, self.global_batch_size):
            yield start, min(start + self.global_batch_size, self.total_positions)

    def share(self, start: int, end: int) -> tuple[int, int]:
        """Return this rank's (start, end) within a global batch; the sizes of shares differ by at most one."""
        return even_part(start, end, self.rank, self.world_size)

    def micro_shares(self, start: int, end: int) -> list[MicroShare]:
        """Return this rank's share of a global batch, divided into micro-batches."""
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
    """Return part number `part` of [start, end), cut into contiguous parts of sizes that differ by at most one.

    The longer parts come first.
    """
    size, longer = divmod(end - start, parts)
    first = start + part * size + min(part, longer)
    return first, first + size + (part < longer)


def cut_off(low: int, high: int, start: int, end: int) -> list[int]:
    """Return the partners of [low, high) outside of it, at most two, within the global batch [start, end).

    Pairs are counted from the start of the global batch; if its size is odd, the last sample has no partner.
    """
    before = [low - 1] if low < high and (low - start) % 2 else []
    return before + ([high] if low < high < end and (high - start) % 2 else [])
