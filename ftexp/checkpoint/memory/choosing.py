"""Choice of the snapshot that an attempt resumes from: a pure function of what the keepers hold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Held:
    """A shard's snapshot in a keeper."""

    node: str
    shard: str  # "0/1": shard 0 of 1
    slot: int
    sequence: int
    num_bytes: int
    step: int
    attempt: int
    run: str  # name of the run
    fingerprint: str  # hash of what defines the run

    @classmethod
    def of(cls, node: str, facts: Mapping[str, Any]) -> Held:
        """Return the snapshot that the keeper of `node` describes."""
        place = (facts["shard"], facts["slot"], facts["sequence"], facts["bytes"])
        return cls(node, *place, facts["step"], facts["attempt"], facts["run"], facts["fingerprint"])

    @property
    def number(self) -> int:
        """Index of the shard."""
        return int(self.shard.partition("/")[0])

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return int(self.shard.partition("/")[2])


@dataclass(frozen=True)
class Choice:
    """A step that every rank can load from memory, with the copies of each shard in the order of shards."""

    step: int
    attempt: int
    shards: tuple[tuple[Held, ...], ...]

    def without(self, bad: Iterable[Held]) -> bool:
        """Return whether every shard still has a copy without these."""
        gone = set(bad)
        return all(any(each not in gone for each in copies) for copies in self.shards)


def choose(
    held: Iterable[Held], limits: Mapping[int, int | None], run: str, fingerprint: str, min_step: int
) -> Choice | None:
    """Return the newest step of which all shards are held; None if there is none.

    Args:
        held: what all keepers hold.
        limits: attempt -> its last step that the run descends from; None: any. Snapshots of other attempts are ignored.
        run: name of the run.
        fingerprint: hash of what defines the run.
        min_step: step of the newest checkpoint in storage; 0 without one.
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
    """Return the copy to read on a node: its own if it has one, else the newest; None if all are bad."""
    gone = set(bad)
    left = [each for each in copies if each not in gone]
    return max(left, key=lambda each: (each.node == node, each.sequence), default=None)
