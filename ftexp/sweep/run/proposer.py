"""Interface through which a sweep gets its trials, from a grid or a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ftexp.sweep.run.runner import TrialProcess


class Proposer(Protocol):
    """Source of a sweep's trials, which also decides which ones to stop early."""

    processes: list[TrialProcess]  # proposed so far, in that order; the caller of `next_process` appends its result

    @property
    def probes(self) -> Sequence[TrialProcess]:
        """Trials whose configs together need everything that any trial needs of the cluster."""

    @property
    def num_trials(self) -> int:
        """Total number of trials."""

    @property
    def description(self) -> str | None:
        """Description of the search in one line; None if trials are given."""

    @property
    def min_needs(self) -> dict[str, float]:
        """Minimum resources that a trial yet to be proposed needs."""

    @property
    def has_more(self) -> bool:
        """Whether there are trials yet to be proposed."""

    def next_process(self) -> TrialProcess | None:
        """Propose the next trial and record it, before it starts; None if there is none. OSError if that fails."""

    def to_stop(self) -> list[tuple[TrialProcess, int]]:
        """Return running trials to stop early, each with the epoch whose value decides it."""

    def settle(self) -> None:
        """Take ended trials into account, before the record says that they have ended."""
