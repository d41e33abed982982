"""Reading the snapshot that an attempt resumes from: all ranks find, choose and read it together."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftexp.checkpoint.memory.choosing import Choice, Held, choose, nearest
from ftexp.checkpoint.memory.keeper import KeeperLostError, Links, fetch, opened
from ftexp.checkpoint.memory.packing import merged, unpacked
from ftexp.checkpoint.memory.slot import Slot
from ftexp.checkpoint.sharding import Piece
from ftexp.checkpoint.tree import leaf_at, mapped
from ftexp.errors import CheckpointError

if TYPE_CHECKING:
    from ftexp.checkpoint.sharding import Place
    from ftexp.job.group import ProcessGroup

_ASK_S = 1.0  # time limit for a keeper to list its snapshots; one that is restarting has none
_RESERVE_S = 5.0  # time limit for a keeper to locate a slot
_CUT = "\0cut"  # placeholder of a tensor of which each rank has its own rows


class SnapshotReader:
    """Reads snapshots for one rank; every rank makes the same calls.

    place: this rank's place among those that share tensors; None: it holds whole tensors.
    """

    def __init__(self, links: Links, group: ProcessGroup, place: Place | None) -> None:
        self._links, self._group, self._place = links, group, place
        self._bad: set[Held] = set()
        self._held: list[Held] = []

    def find(self) -> None:
        """List the snapshots of this node's keeper and, on rank 0, of keepers on nodes without ranks; collective."""
        node = self._links.node
        found = self._group.gather((node, self._ask(node)))
        by_node = dict(found)
        if self._group.rank == 0:
            for other in self._links.nodes():
                if other not in by_node:
                    by_node[other] = self._ask(other)
        self._held = [each for held in by_node.values() for each in held]

    def _ask(self, node: str) -> list[Held]:
        try:
            return [Held.of(node, facts) for facts in self._links.call(node, "held", timeout_s=_ASK_S)]
        except KeeperLostError:
            return []

    def read(
        self, lineage: Mapping[int, int | None], run: str, fingerprint: str, min_step: int
    ) -> tuple[Choice, dict[str, Any]] | None:
        """Return the newest state that every rank can read, with its choice; None if there is none. Collective.

        Snapshots that don't verify are rejected, and the next one is read. Arguments as of `choose`.
        """
        while True:
            left = [each for each in self._held if each not in self._bad]
            choice = choose(left, lineage, run, fingerprint, min_step) if self._group.rank == 0 else None
            choice = self._group.agree_on(choice)
            if choice is None:
                return None
            trees, bad = self._trees(choice)
            is_bad = [each for found in self._group.gather(bad) for each in found]
            if not is_bad:
                return choice, self._whole(choice, trees)
            self._bad.update(is_bad)

    def _trees(self, choice: Choice) -> tuple[list[Any], list[Held]]:
        """Return the trees that this rank needs of a choice, and the snapshots that can't be read or don't verify."""
        trees, bad = [], list[Held]()
        for copies in self._needed(choice):
            found = nearest(copies, self._links.node)
            assert found is not None, "every shard has a copy"
            tree = self._tree(found)
            if tree is None:
                bad.append(found)
                break
            trees.append(tree)
        return trees, bad

    def _needed(self, choice: Choice) -> tuple[tuple[Held, ...], ...]:
        """Return the copies of each shard that this rank reads: its own if the sharding is the same, else all."""
        if self.lies_alike(choice) and self._place is not None:
            return (choice.shards[self._place.shard],)
        return choice.shards

    def lies_alike(self, choice: Choice) -> bool:
        """Return whether a choice has as many shards as this rank's tensors have."""
        return len(choice.shards) == (1 if self._place is None else self._place.num_shards)

    def _tree(self, held: Held) -> Any:
        """Return a snapshot's tree; None if it doesn't verify or is gone."""
        with contextlib.suppress(KeeperLostError, OSError, CheckpointError):
            slot = Slot(self._memory(held))
            header = slot.verified(held.sequence)
            return None if header is None else unpacked(slot, header)
        return None

    def _memory(self, held: Held) -> memoryview:
        """Return a slot's memory, or a copy from another node; KeeperLostError or OSError if it can't be reached."""
        if held.node == self._links.node:
            reserved = self._links.call(held.node, "reserve", held.shard, 0, 0, timeout_s=_RESERVE_S)
            return memoryview(opened(reserved)[held.slot])
        memory = memoryview(bytearray(held.num_bytes))
        fetch(self._links, held.node, held.slot, held.shard, held.num_bytes, memory)
        return memory

    def _whole(self, choice: Choice, trees: list[Any]) -> dict[str, Any]:
        """Return the state; on every rank, its unsharded leaves are those of the first shard. Collective."""
        if not self.lies_alike(choice):
            whole: dict[str, Any] = merged(trees)
            return whole
        (tree,) = trees
        if self._place is not None:
            frame = self._group.agree_on(mapped(tree, lambda leaf, _: _CUT if isinstance(leaf, Piece) else leaf))
            tree = mapped(frame, lambda leaf, path: leaf_at(tree, path) if _is_cut(leaf) else leaf)
        state: dict[str, Any] = tree
        return state


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, str) and leaf == _CUT
