"""Which states of earlier attempts a run descends from, as far as they may be in memory."""

from __future__ import annotations


class Lineage:
    """The attempts of an invocation, and where each began."""

    def __init__(self) -> None:
        self._limits: dict[int, int | None] = {}

    def began(self, attempt: int, step: int) -> None:
        """An attempt trains on after `step`: what others did after it is none of the run."""
        self._limits = {earlier: step if limit is None else min(limit, step) for earlier, limit in self._limits.items()}
        self._limits[attempt] = None

    def broke(self) -> None:
        """Nothing that was in memory can be trusted: the last failure was of the state itself."""
        self._limits = {}

    def as_pairs(self) -> list[list[int | None]]:
        """Return [attempt, its last step that the run descends from] of each; None: any."""
        return [[attempt, limit] for attempt, limit in self._limits.items()]
