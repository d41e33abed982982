"""One rank's snapshots in memory: the state is copied while training waits; the rest runs on a background thread."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp.checkpoint.memory.keeper import NUM_SLOTS, KeeperLostError, Links, Reserved, opened, supported
from ftexp.checkpoint.memory.pace import Pace
from ftexp.checkpoint.memory.packing import SlotCopier, SlotIsFullError, slot_bytes
from ftexp.checkpoint.memory.slot import Slot, sequence_of
from ftexp.checkpoint.priority import give_way
from ftexp.wire import events
from ftexp.wire.messages import Happened

if TYPE_CHECKING:
    from ftexp.checkpoint.sharding import Place
    from ftexp.config.schema import FailureConfig
    from ftexp.job.group import ProcessGroup
    from ftexp.wire.channel import Channel

OFF, BUSY, UNPREPARED, READY = range(4)  # a rank's readiness to take a snapshot
_RESERVE_S = 30.0  # time limit for a keeper to reserve slots: it allocates all of their memory
_COPY_S = 600.0  # time limit of a copy to another node
_CLOSE_S = 1.0  # time limit of the wait for the thread at the end
_LOOK_AGAIN_S = 0.25  # delay before looking again for a keeper that isn't there yet


@dataclass
class _Room:
    """The slots of this rank, on this node."""

    reserved: Reserved
    keeper: int  # pidfd
    copiers: list[SlotCopier]
    sequences: list[int]  # number of the snapshot in each slot; 0: none

    @property
    def keeper_lives(self) -> bool:
        return not select.select([self.keeper], [], [], 0)[0]


class Snapshots:
    """Takes one rank's snapshots. Every rank builds one, and calls its methods at the same steps.

    Args:
        config: its `memory_every_steps` says how often.
        group: all ranks.
        channel: to the driver.
        links: to the keepers.
        place: this rank's place among those that share tensors; None: it holds whole tensors.
    """

    def __init__(
        self, config: FailureConfig, group: ProcessGroup, channel: Channel, links: Links, place: Place | None
    ) -> None:
        self._group, self._channel, self.links = group, channel, links
        self.writes = group.rank == 0 if place is None else place.is_first_replica
        self._shard = "0/1" if place is None else f"{place.shard}/{place.num_shards}"
        self._is_cut = place is not None
        self._pace = Pace(config.memory_every_steps, group.agree)
        self._is_off = not group.all_agree(supported())
        self._lowest = OFF  # lowest readiness of all ranks at the last check
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._room: _Room | None = None
        self._refused = False
        self._others: list[str] = []  # nodes that keep a copy; each copies from the previous one
        self._thread_s = 0.0  # CPU time of the thread for the last snapshot
        self._num_taken = 0
        if not self._is_off:
            self._find_others()

    def _find_others(self) -> None:
        """Choose the nodes that keep a copy: every node of a whole state, the next node of a shard."""
        nodes = list(dict.fromkeys(self._group.gather(self.links.node)))
        at = nodes.index(self.links.node)
        others = nodes[at + 1 :] + nodes[:at]
        self._others = others[:1] if self._is_cut else others

    def due(self, step: int, saves: bool) -> bool:
        """Return whether to call `take` after `step`, the last one done; collective.

        saves: whether a checkpoint is in flight or due, and a snapshot has to wait.
        """
        if self._is_off or not self._pace.step_done(step):
            return False
        self._lowest = self._group.lowest(BUSY if saves else self._readiness())
        if self._lowest == OFF:
            self._is_off = True
        elif self._lowest == BUSY:
            self._pace.postpone(step)
        return self._lowest > BUSY

    def _readiness(self) -> int:
        if self._refused:
            return OFF
        if self._thread is not None and self._thread.is_alive():
            return BUSY
        if not self.writes:
            return READY
        if self._room is not None and not self._room.keeper_lives:
            self._leave_room()
        return UNPREPARED if self._room is None else READY

    def take(self, step: int, state: Any, facts: dict[str, Any], began: float) -> None:
        """Copy this rank's part of `state`, and complete it in the background; collective.

        The first call only makes room. began: time at which training began to wait, by time.perf_counter.
        """
        if self._lowest < READY:
            if self.writes and self._room is None:
                self._begin(self._make_room, *slot_bytes(state))
            self._pace.postpone(step)
            return
        if self.writes:
            self._copy(state, {**facts, "shard": self._shard})
        # unless a GPU trains, the thread's CPU time is also lost to training
        besides_s = 0.0 if self._group.device.type == "cuda" else self._thread_s
        self._pace.taken(step, time.perf_counter() - began + besides_s)
        self._report()

    def leave_out(self, step: int) -> None:
        """Take no snapshot of this step, whose state isn't worth keeping."""
        self._pace.postpone(step)

    def _report(self) -> None:
        """Report the cost of snapshots once an attempt: after the third, since the first ones also touch new memory."""
        self._num_taken += 1
        if self._num_taken != NUM_SLOTS + 1 or self._group.rank != 0 or self._room is None:
            return
        share = self._pace.cost_s / max(self._pace.interval * self._pace.step_s, 1e-9)
        cost = (self._pace.interval, round(self._pace.cost_s, 6), round(share, 6))
        self._channel.send(Happened(events.SnapshotsTaken(*cost, self._room.reserved.node_bytes)))

    def _copy(self, state: Any, facts: dict[str, Any]) -> None:
        assert self._room is not None
        sequences = self._room.sequences
        number, sequence = sequences.index(min(sequences)), max(sequences) + 1
        sequences[number] = 0
        try:
            copied = self._room.copiers[number].copy(state)
        except SlotIsFullError:
            self._leave_room()
            return
        self._begin(self._complete, self._room, number, sequence, copied, facts)

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run `work` on a background thread; a run that ends doesn't wait for it."""

        def run() -> None:
            try:
                work(*arguments)
            except Exception as error:
                self._refuse(f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=run, daemon=True, name="snapshot")
        self._thread.start()

    def _make_room(self, needed: int, wanted: int) -> None:
        """On the thread: reserve slots in the keeper, once there is one."""
        while not self._closed.is_set():
            try:
                answer = self.links.call(self.links.node, "reserve", self._shard, needed, wanted, timeout_s=_RESERVE_S)
                if isinstance(answer, str):
                    self._refuse(answer)
                    return
                slots = [Slot(memoryview(mapped)) for mapped in opened(answer)]
                keeper = os.pidfd_open(answer.pid)
            except KeeperLostError:
                self._closed.wait(_LOOK_AGAIN_S)
                continue
            except OSError as error:
                self._refuse(f"the keeper's memory can't be reached: {error}")
                return
            copiers = [SlotCopier(slot, self._group.device) for slot in slots]
            self._room = _Room(answer, keeper, copiers, list(map(sequence_of, slots)))
            reserved = events.SnapshotsBegun(self.links.node, answer.pid, answer.node_bytes)
            self._channel.send(Happened(reserved))
            return

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self._channel.send(Happened(events.SnapshotsOff(reason)))

    def _complete(self, room: _Room, number: int, sequence: int, copied: Any, facts: dict[str, Any]) -> None:
        """On the thread: complete a snapshot, once all reports up to its step have left this process, and copy it."""
        began, copier = time.thread_time(), room.copiers[number]
        data_bytes, outline = copier.outline(copied)
        self._channel.flush()
        give_way()  # not earlier: a thread that waits for a core while it holds the GIL blocks training
        if copier.slot.seal(sequence, data_bytes, facts, outline):
            room.sequences[number] = sequence
        self._thread_s = time.thread_time() - began
        if (header := copier.slot.header()) is None:
            return
        source = (self.links.node, number)
        for node in self._others:
            copied_from = (*source, self._shard, header.end, room.reserved.slot_bytes)
            with contextlib.suppress(KeeperLostError):  # that node is skipped
                taken = self.links.call(node, "copy_from", *copied_from, timeout_s=_COPY_S)
                source = source if taken is None else (node, taken)

    def _leave_room(self) -> None:
        if self._room is not None:
            os.close(self._room.keeper)
            self._room = None

    def close(self) -> None:
        """Stop taking snapshots; one that is being completed is finished, except for slow copies to other nodes."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
