"""The keeper: a process on each node that owns the memory of the node's snapshots, and outlives the workers.

The memory consists of anonymous files. They are in no directory, and are freed once the keeper and all processes that
mapped them have exited, for whatever reason. Workers on the node open them through the keeper's /proc/<pid>/fd; other
nodes read them through Ray. A keeper exits with the driver's job. If it dies earlier, Ray restarts it, empty.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ftexp.checkpoint.memory.slot import PAGE, Slot, sequence_of

NUM_SLOTS = 2  # one holds the last snapshot while the other takes the next
CHUNK_BYTES = 1 << 24  # maximum size of a transfer through Ray
_FREE_SHARE = 0.25  # share of a node's free memory that snapshots may take, unless the config sets a limit
_ANSWER_S = 60.0  # time limit of a read from another keeper


class KeeperLostError(Exception):
    """A keeper has died, or doesn't answer."""


class Links(Protocol):
    """A process's access to the keepers."""

    @property
    def node(self) -> str:
        """The id of this process's node."""

    def nodes(self) -> list[str]:
        """Return the nodes that have, or had, a keeper."""

    def call(self, node: str, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Call a keeper's method; KeeperLostError if there is no answer in time."""


@dataclass(frozen=True)
class Reserved:
    """Location of a writer's slots."""

    pid: int
    files: list[int]  # file descriptors of that process
    slot_bytes: int
    node_bytes: int  # size of all slots on the node


@dataclass
class _Room:
    """The slots of one writer."""

    slot_bytes: int
    files: list[int] = field(default_factory=list)
    maps: list[mmap.mmap] = field(default_factory=list)

    @property
    def slots(self) -> list[Slot]:
        return [Slot(memoryview(mapped)) for mapped in self.maps]


class Keeper:
    """Owns the slots of a node's writers, and of copies from other nodes, by shard: "0/1".

    Args:
        links: to the keepers of other nodes.
        max_bytes: limit for all slots; None: a share of the free memory.
    """

    def __init__(self, links: Links, max_bytes: int | None) -> None:
        self._links = links
        self._max_bytes = int(_FREE_SHARE * free_bytes()) if max_bytes is None else max_bytes
        self._rooms: dict[str, _Room] = {}
        self._lock = threading.Lock()

    def reserve(self, shard: str, min_bytes: int, slot_bytes: int) -> Reserved | str:
        """Return the location of a shard's slots, or the reason why there is no room for them.

        Existing slots of at least `min_bytes` are kept with their content; new ones have `slot_bytes`.
        """
        with self._lock:
            room = self._rooms.get(shard)
            if room is None or room.slot_bytes < min_bytes:
                others = sum(NUM_SLOTS * each.slot_bytes for key, each in self._rooms.items() if key != shard)
                slot_bytes = -(-slot_bytes // PAGE) * PAGE
                if (wanted := NUM_SLOTS * slot_bytes + others) > self._max_bytes:
                    return f"two snapshots take {wanted / 1e9:.2f} GB, of {self._max_bytes / 1e9:.2f} GB allowed"
                self._free(shard)
                try:
                    room = self._rooms[shard] = _made(slot_bytes)
                except OSError as error:
                    return f"two snapshots take {wanted / 1e9:.2f} GB, and the memory can't be had: {error}"
            node_bytes = sum(NUM_SLOTS * each.slot_bytes for each in self._rooms.values())
            return Reserved(os.getpid(), list(room.files), room.slot_bytes, node_bytes)

    def held(self) -> list[dict[str, Any]]:
        """Return the facts and the location of each snapshot whose header says that it is complete."""
        with self._lock:
            found = []
            for shard, room in self._rooms.items():
                for number, slot in enumerate(room.slots):
                    facts, header = slot.facts(), slot.header()
                    if facts is not None and header is not None:
                        place = {"shard": shard, "slot": number, "sequence": header.sequence, "bytes": header.end}
                        found.append({**facts, **place})
            return found

    def read(self, slot: int, shard: str, offset: int, size: int) -> bytes:
        """Return bytes of a slot; empty if there is no such slot."""
        with self._lock:
            room = self._rooms.get(shard)
            return b"" if room is None else room.maps[slot][offset : offset + size]

    def copy_from(self, node: str, slot: int, shard: str, num_bytes: int, slot_bytes: int) -> int | None:
        """Copy a snapshot from another node's keeper, with slots of its size; returns the slot, None without room."""
        if isinstance(self.reserve(shard, num_bytes, slot_bytes), str):
            return None
        with self._lock:
            room = self._rooms[shard]
        number = min(range(NUM_SLOTS), key=lambda each: sequence_of(room.slots[each]))
        fetch(self._links, node, slot, shard, num_bytes, memoryview(room.maps[number]))
        return number

    def _free(self, shard: str) -> None:
        if (room := self._rooms.pop(shard, None)) is not None:
            for descriptor in room.files:  # mappings are freed with their last user
                os.close(descriptor)


def _made(slot_bytes: int) -> _Room:
    """Make slots; OSError if there is no memory for them."""
    room = _Room(slot_bytes)
    try:
        for number in range(NUM_SLOTS):
            descriptor = os.memfd_create(f"ftexp-snapshot-{number}")
            room.files.append(descriptor)
            os.posix_fallocate(descriptor, 0, slot_bytes)  # allocates now; a lack of memory later would kill a worker
            room.maps.append(mmap.mmap(descriptor, slot_bytes))
    except OSError:
        for descriptor in room.files:
            os.close(descriptor)
        raise
    return room


def fetch(links: Links, node: str, slot: int, shard: str, num_bytes: int, memory: memoryview) -> None:
    """Read a snapshot from another node into memory, which is no valid snapshot until all of it is there.

    KeeperLostError if that node's keeper is lost, or no longer has the snapshot.
    """
    Slot(memory).clear()
    for begin in [*range(PAGE, num_bytes, CHUNK_BYTES), 0]:  # the header comes last
        size = min(CHUNK_BYTES, num_bytes - begin) if begin else PAGE
        content = links.call(node, "read", slot, shard, begin, size, timeout_s=_ANSWER_S)
        if len(content) != size:
            raise KeeperLostError(f"the keeper of node {node} has no such snapshot any more")
        memory[begin : begin + size] = content


def opened(reserved: Reserved) -> list[mmap.mmap]:
    """Map a keeper's slots on its own node; OSError if they can't be reached."""
    maps = []
    for number in reserved.files:
        descriptor = os.open(f"/proc/{reserved.pid}/fd/{number}", os.O_RDWR)
        try:
            if os.fstat(descriptor).st_size != reserved.slot_bytes:
                raise OSError(f"process {reserved.pid} is no keeper any more")
            maps.append(mmap.mmap(descriptor, reserved.slot_bytes))
        finally:
            os.close(descriptor)
    return maps


def free_bytes() -> int:
    """Return the free memory of the machine or the container, whichever is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    (available,) = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or no limit: "max"
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, available)


def supported() -> bool:
    """Return whether this platform has memory that one process owns and others can open: Linux."""
    return hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()
