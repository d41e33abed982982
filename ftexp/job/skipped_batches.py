"""Batches that drive no update, because their gradient was not finite."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]  # positions [start, end)


class SkippedBatches:
    """Ranges of positions, each of one or more whole global batches. The same on every rank."""

    def __init__(self, ranges: Iterable[Iterable[int]] = ()) -> None:
        self._ranges: list[Range] = []
        for start, end in ranges:
            self.add((start, end))

    def cover(self, start: int) -> bool:
        """Return whether the batch that begins at position `start` is skipped."""
        return any(first <= start < end for first, end in self._ranges)

    def add(self, added: Range) -> None:
        """Add a range; ranges that touch are merged."""
        start, end = added
        apart = [(first, last) for first, last in self._ranges if last < start or first > end]
        touching = [other for other in self._ranges if other not in apart]
        joined = (min([start, *(first for first, _ in touching)]), max([end, *(last for _, last in touching)]))
        self._ranges = sorted([*apart, joined])

    def widened(self, start: int, end: int, first: int) -> Range:
        """Return the range to skip for a bad batch [start, end); it begins no earlier than `first`.

        It is the batch alone, unless the batches just before it are skipped already. In that case the error began
        earlier, while the weights were still finite, so the same number of batches before those is skipped too.
        """
        before = next((other for other, last in self._ranges if last == start), start)
        return max(first, before - (start - before)), end
