"""The states of earlier attempts that a run descends from, as far as they may still be in memory."""

from __future__ import annotations


class Lineage:
    """The attempts of an invocation, and the last step of each that the run descends from."""

    def __init__(self) -> None:
        self._limits: dict[int, int | None] = {}

    def began(self, attempt: int, step: int) -> None:
        """Note that an attempt continues after `step`: later states of earlier attempts are not the run's."""
        self._limits = {earlier: step if limit is None else min(limit, step) for earlier, limit in self._limits.items()}
        self._limits[attempt] = None

    def broke(self) -> None:
        """Exclude all states in memory: the state itself was bad, so none can be trusted."""
        self._limits = {}

    def as_pairs(self) -> list[list[int | None]]:
        """Return [attempt, last step that the run descends from] of each; None: every step."""
        return [[attempt, limit] for attempt, limit in self._limits.items()]
