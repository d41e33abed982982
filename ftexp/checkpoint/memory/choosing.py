"""Which snapshot an attempt resumes from: a pure function of what the keepers hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Held:
    """A snapshot of a shard, as a keeper holds it."""

    node: str
    shard: str  # "0/1": the first of one
    slot: int
    sequence: int
    num_bytes: int
    step: int
    attempt: int
    run: str  # its name
    fingerprint: str  # hash of what defines it

    @classmethod
    def of(cls, node: str, facts: Mapping[str, Any]) -> Held:
        """Return what a keeper of `node` says of a snapshot."""
        place = (facts["shard"], facts["slot"], facts["sequence"], facts["bytes"])
        return cls(node, *place, facts["step"], facts["attempt"], facts["run"], facts["fingerprint"])

    @property
    def number(self) -> int:
        """Return the number of its shard."""
        return int(self.shard.partition("/")[0])

    @property
    def num_shards(self) -> int:
        """Of how many."""
        return int(self.shard.partition("/")[2])


@dataclass(frozen=True)
class Choice:
    """A step that every rank can get from memory: the copies of each of its shards, in their order."""

    step: int
    attempt: int
    shards: tuple[tuple[Held, ...], ...]

    def without(self, bad: Iterable[Held]) -> bool:
        """Whether it is still there without these."""
        gone = set(bad)
        return all(any(each not in gone for each in copies) for copies in self.shards)


def choose(
    held: Iterable[Held], limits: Mapping[int, int | None], run: str, fingerprint: str, min_step: int
) -> Choice | None:
    """Return the newest step of which there are all shards; None if there is none.

    Args:
        held: what all keepers hold.
        limits: attempt -> its last step that the run descends from; None: any. Other attempts' steps are none of it.
        run: name of the run.
        fingerprint: of what defines it.
        min_step: that of the newest checkpoint in storage, 0 without one.
    """
    found: dict[tuple[int, int, int], dict[int, list[Held]]] = defaultdict(lambda: defaultdict(list))
    for each in held:
        if (each.run, each.fingerprint) != (run, fingerprint) or each.attempt not in limits:
            continue
        limit = limits[each.attempt]
        if each.step >= min_step and (limit is None or each.step <= limit):
            found[each.step, each.attempt, each.num_shards][each.number].append(each)
    whole = [place for place, shards in found.items() if len(shards) == place[2]]
    if not whole:
        return None
    step, attempt, num_shards = best = max(whole)
    return Choice(step, attempt, tuple(tuple(found[best][number]) for number in range(num_shards)))


def nearest(copies: Iterable[Held], node: str, bad: Iterable[Held] = ()) -> Held | None:
    """Return the copy to read on a node: its own, or else the newest written; None if all are bad."""
    gone = set(bad)
    left = [each for each in copies if each not in gone]
    return max(left, key=lambda each: (each.node == node, each.sequence), default=None)
