"""In-memory snapshots: slots that are complete or empty, keepers, the pace, the choice, and resuming a run."""

import dataclasses
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftexp.chaos.plan import Fault
from ftexp.chaos.strike import Chaos
from ftexp.checkpoint.build import build_manager
from ftexp.checkpoint.cadence import Cadence
from ftexp.checkpoint.memory import keeper as keeping
from ftexp.checkpoint.memory.choosing import Held, choose, nearest
from ftexp.checkpoint.memory.keeper import Keeper, KeeperLostError, Reserved, fetch, opened
from ftexp.checkpoint.memory.pace import SHARE, Pace
from ftexp.checkpoint.memory.packing import SlotCopier, SlotIsFullError, merged, slot_bytes, unpacked
from ftexp.checkpoint.memory.slot import PAGE, Slot, sequence_of
from ftexp.checkpoint.restore import restore
from ftexp.checkpoint.sharding import Piece
from ftexp.checkpoint.store import CheckpointStore
from ftexp.config.checks.failure import check_failure
from ftexp.config.schema import CheckpointConfig, Config, FailureConfig
from ftexp.drill import command as drill
from ftexp.driver.keepers import Keepers
from ftexp.errors import ConfigError
from ftexp.job.job import RunIdentity
from ftexp.rundir.lineage import Lineage
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState, read_state
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import ForgetSnapshots, Happened, Hello, Ready, Tick
from ftexp.worker.loop import advance, run_steps
from ftexp.worker.step import train_step
from tests.support.jobs import CPU, copied, make_job, same
from tests.support.keepers import Nodes

STATES = ["progress", "scheduler", "scaler", "ema", "rng", "best"]


def slot_of(num_bytes=1 << 16):
    return Slot(memoryview(bytearray(num_bytes)))


def tree():
    torch.manual_seed(0)
    return {
        "model.pt": {
            "w": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
            "half": torch.randn(5).to(torch.bfloat16),
            "empty": torch.empty(0, 4),
        },
        "optimizer.pt": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "extra_state.pt": {"python": random.Random(0).getstate(), "none": None, "text": "x"},
    }


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return (first.dtype, first.shape, first.stride()) == (second.dtype, second.shape, second.stride()) and bool(
            torch.equal(first, second)
        )
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return first == second


def written(slot, state, sequence=1):
    copier = SlotCopier(slot, CPU)
    data_bytes, outline = copier.outline(copier.copy(state))
    assert slot.seal(sequence, data_bytes, {"step": 5}, outline)
    return slot.header()


def test_a_state_comes_out_of_a_slot_as_it_went_in():
    least, wanted = slot_bytes(tree())
    assert least <= wanted
    slot = slot_of(least)
    header = written(slot, tree(), sequence=3)
    assert slot.verified(3) == header
    assert slot.verified(4) is None
    assert (slot.facts(), sequence_of(slot)) == ({"step": 5}, 3)
    assert equal(unpacked(slot, header), tree())


def test_a_slot_is_written_again_in_place_until_shapes_change():
    slot = slot_of(slot_bytes(tree())[1])
    copier, state = SlotCopier(slot, CPU), tree()
    places = [copier.copy(state)["model.pt"]["w"].data_ptr() for _ in range(3)]
    assert len(set(places)) == 1
    state["model.pt"]["half"] = torch.randn(6)
    data_bytes, outline = copier.outline(copier.copy(state))
    assert slot.seal(1, data_bytes, {}, outline)
    assert equal(unpacked(slot, slot.verified(1)), state)
    state["model.pt"]["half"] = torch.randn(1 << 16)
    with pytest.raises(SlotIsFullError):
        copier.copy(state)
    assert slot.header() is None


def test_an_outline_that_has_no_room_leaves_the_slot_incomplete():
    slot = slot_of(PAGE + 4096)
    assert not slot.seal(1, 64, {}, bytes(5000))
    assert (slot.header(), slot.facts(), sequence_of(slot)) == (None, None, 0)


def test_what_is_begun_and_not_completed_holds_nothing():
    slot = slot_of(slot_bytes(tree())[1])
    written(slot, tree())
    SlotCopier(slot, CPU).copy(tree())  # then the worker was killed
    assert (slot.header(), slot.facts(), slot.verified(1)) == (None, None, None)


@given(where=st.floats(0, 1, exclude_max=True), flipped=st.integers(1, 255))
def test_any_byte_of_a_snapshot_that_changed_is_found(where, flipped):
    memory = bytearray(1 << 16)
    slot = Slot(memoryview(memory))
    header = written(slot, tree())
    used = [*range(72), *range(PAGE, header.end)]  # magic, numbers and hash; then the content
    memory[used[int(where * len(used))]] ^= flipped
    assert slot.verified(1) is None


def test_a_header_that_claims_more_than_there_is_is_none():
    slot = slot_of(1 << 16)
    written(slot, tree())
    assert Slot(slot._memory[: PAGE + 100]).header() is None


def test_pieces_of_all_shards_make_the_whole_again():
    whole = torch.arange(35.0).view(7, 5)
    found = []
    for number, rows in enumerate((whole[:3], whole[3:6], whole[6:])):
        copier = SlotCopier(slot_of(), CPU)
        copied = copier.copy({"w": rows, "own": number, "none": torch.empty(0, 2)})
        pieces = {"w": Piece(copied["w"], 3 * number, (7, 5)), "none": Piece(copied["none"], 0, (0, 2))}
        data_bytes, outline = copier.outline({**copied, **pieces})
        assert copier.slot.seal(1, data_bytes, {}, outline)
        found.append(unpacked(copier.slot, copier.slot.header()))
    assert (found[1]["w"].first, found[1]["w"].shape) == (3, (7, 5))
    found = merged([found[0], found[2], found[1]])
    assert torch.equal(found["w"], whole)
    assert (found["own"], found["none"].shape) == (0, (0, 2))


# Keepers


def test_a_keeper_hands_out_memory_that_other_processes_map(tmp_path):
    nodes = Nodes("a")
    reserved = nodes.keepers["a"].reserve("0/1", 100, 9000)
    assert isinstance(reserved, Reserved)
    assert (reserved.slot_bytes, reserved.node_bytes) == (3 * PAGE, 6 * PAGE)
    one, two = (Slot(memoryview(mapped)) for mapped in opened(reserved))
    assert one.seal(4, 10, {"step": 3}, b"x")
    two.clear()
    (held,) = nodes.keepers["a"].held()
    assert held == {"step": 3, "shard": "0/1", "slot": 0, "sequence": 4, "bytes": PAGE + 10 + len('{"step": 3}') + 1}
    assert nodes.keepers["a"].reserve("0/1", 3 * PAGE, 4 * PAGE) == reserved  # including its content
    assert len(nodes.keepers["a"].held()) == 1
    larger = nodes.keepers["a"].reserve("0/1", 3 * PAGE + 1, 4 * PAGE)
    assert larger.slot_bytes == 4 * PAGE
    assert nodes.keepers["a"].held() == []
    with pytest.raises(OSError, match=r"No such file|no keeper any more"):
        opened(dataclasses.replace(larger, slot_bytes=PAGE))


def test_no_memory_is_left_in_a_directory_and_all_of_it_goes_with_the_keeper():
    before = set(Path("/dev/shm").iterdir())
    keeper = Keeper(Nodes().links("a"), None)
    reserved = keeper.reserve("0/1", 1 << 20, 1 << 20)
    assert set(Path("/dev/shm").iterdir()) == before
    names = [str(Path(f"/proc/self/fd/{number}").readlink()) for number in reserved.files]
    assert all(name.startswith("/memfd:ftexp-snapshot-") for name in names)


def test_memory_is_bounded_over_all_that_a_keeper_holds():
    nodes = Nodes("a", max_bytes=10 * PAGE)
    keeper = nodes.keepers["a"]
    assert isinstance(keeper.reserve("0/2", PAGE, 3 * PAGE), Reserved)
    assert keeper.reserve("1/2", 3 * PAGE, 3 * PAGE) == "two snapshots take 0.00 GB, of 0.00 GB allowed"
    assert isinstance(keeper.reserve("1/2", 2 * PAGE, 2 * PAGE), Reserved)
    assert keeper.reserve("0/2", 9 * PAGE, 9 * PAGE).startswith("two snapshots take")
    assert isinstance(keeper.reserve("0/2", 3 * PAGE, 9 * PAGE), Reserved)  # the existing slots stay


def test_what_the_machine_lacks_is_a_reason_and_no_error(monkeypatch):
    def full(*_):
        raise OSError(12, "Cannot allocate memory")

    keeper = Nodes("a").keepers["a"]
    make, made = os.memfd_create, []
    monkeypatch.setattr(keeping.os, "memfd_create", lambda name: made.append(make(name)) or made[-1])
    monkeypatch.setattr(keeping.os, "posix_fallocate", full)
    assert "the memory can't be had: [Errno 12]" in keeper.reserve("0/1", PAGE, PAGE)
    assert made
    for descriptor in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_free_memory_is_the_machines_or_the_containers():
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    assert 0 < keeping.free_bytes() < total


def test_another_node_reads_and_copies_what_a_keeper_holds(monkeypatch):
    monkeypatch.setattr(keeping, "CHUNK_BYTES", 1000)
    nodes, size = Nodes("a", "b"), slot_bytes(tree())[1]
    first = Slot(memoryview(opened(nodes.keepers["a"].reserve("0/1", size, size))[1]))
    header = written(first, tree(), sequence=6)
    memory = memoryview(bytearray(header.end))
    fetch(nodes.links("c"), "a", 1, "0/1", header.end, memory)
    assert Slot(memory).verified(6) == header
    assert nodes.keepers["b"].copy_from("a", 1, "0/1", header.end, size) == 0
    (held,) = nodes.keepers["b"].held()
    assert (held["sequence"], held["slot"], held["step"]) == (6, 0, 5)
    written(first, tree(), sequence=7)
    assert nodes.keepers["b"].copy_from("a", 1, "0/1", header.end, size) == 1  # the older one stays
    assert [each["sequence"] for each in nodes.keepers["b"].held()] == [6, 7]
    assert Nodes("b", max_bytes=PAGE).keepers["b"].copy_from("a", 1, "0/1", header.end, size) is None
    with pytest.raises(KeeperLostError, match="no such snapshot any more"):
        fetch(nodes.links("c"), "a", 0, "7/8", header.end, memory)
    assert Slot(memory).header() is None


# The pace


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def due_steps(pace, clock, step_s, first, last, cost_s):
    found = []
    for step in range(first, last + 1):
        clock.now += step_s(step)
        if pace.step_done(step):
            found.append(step)
            clock.now += cost_s
            pace.taken(step, cost_s)
    return found


def test_snapshots_cost_less_than_a_hundredth_of_the_time_whatever_an_evaluation_takes():
    clock = Clock()
    pace = Pace(None, lambda number: number, clock)
    steps = due_steps(pace, clock, lambda step: 5.0 if step % 40 == 0 else 0.125, 1, 400, 0.0624)
    assert steps == [11, *range(74, 401, 63)]
    assert pace.cost_s / (pace.interval * 0.125) <= SHARE < 0.01


def test_every_rank_takes_them_at_the_steps_of_rank_0():
    box, clock = [], Clock()
    first = Pace(None, lambda number: box.append(number) or number, clock)
    other = Pace(None, lambda _: box[-1], clock)
    assert due_steps(first, clock, lambda _: 0.125, 1, 30, 0.0049) == [11, 16, 21, 26]
    box.append(5)
    assert due_steps(other, clock, lambda _: 9.0, 1, 30, 0.0) == [11, 16, 21, 26]


def test_a_number_of_steps_counts_from_the_runs_first():
    clock = Clock()
    assert due_steps(Pace(5, None, clock), clock, lambda _: 0.1, 1, 22, 1.0) == [5, 10, 15, 20]
    assert due_steps(Pace(5, None, clock), clock, lambda _: 0.1, 53, 61, 1.0) == [55, 60]


def test_what_can_not_be_taken_now_is_due_again_soon():
    pace, asked = Pace(5, None, Clock()), []
    for step in range(1, 22):
        if pace.step_done(step):
            asked.append(step)
            pace.taken(step, 0.1) if step == 17 else pace.postpone(step)
    assert asked == [5, 6, 8, 12, 17, 20, 21]


def test_a_snapshot_that_took_long_by_accident_changes_nothing_once_there_were_some():
    clock = Clock()
    pace = Pace(None, lambda number: number, clock)
    due_steps(pace, clock, lambda _: 0.125, 1, 40, 0.0049)
    pace.taken(40, 9.0)
    assert pace.interval == 5


# The choice


def held(node="a", shard="0/1", step=10, attempt=1, slot=0, sequence=1, run="x", fingerprint="f"):
    return Held(node, shard, slot, sequence, 100, step, attempt, run, fingerprint)


def chosen(*found, limits=None, min_step=0):
    choice = choose(found, {1: None} if limits is None else limits, "x", "f", min_step)
    return None if choice is None else (choice.step, choice.attempt)


def test_the_newest_step_is_chosen_of_which_there_is_everything():
    assert chosen() is None
    assert chosen(held(step=10), held(step=15, slot=1)) == (15, 1)
    assert chosen(held(shard="0/2", step=15), held(shard="1/2", step=10), held(shard="0/2", step=10)) == (10, 1)
    assert chosen(held(shard="0/2"), held(shard="1/3")) is None
    assert chosen(held(shard="0/2", node="a"), held(shard="1/2", node="b")) == (10, 1)


def test_what_is_no_ancestor_of_the_run_is_not_chosen():
    assert chosen(held(run="other")) is None
    assert chosen(held(fingerprint="other")) is None
    assert chosen(held(attempt=2)) is None
    assert chosen(held(step=10), held(step=15), limits={1: 12}) == (10, 1)
    assert chosen(held(step=10, attempt=1), held(step=9, attempt=2), limits={1: 8, 2: None}) == (9, 2)
    assert chosen(held(step=10), min_step=10) == (10, 1)
    assert chosen(held(step=10), min_step=11) is None


def test_a_node_reads_its_own_copy_or_the_newest_written():
    here, there, bad = held("a"), held("b", sequence=5), held("c", sequence=9)
    assert nearest([there, here], "a") == here
    assert nearest([here, there], "c") == there
    assert nearest([bad, there], "a", [bad]) == there
    assert nearest([bad], "a", [bad]) is None


def test_an_attempt_that_began_earlier_leaves_what_came_after_to_nobody():
    lineage = Lineage()
    lineage.began(1, 0)
    assert lineage.as_pairs() == [[1, None]]
    lineage.began(2, 40)
    lineage.began(3, 60)
    assert lineage.as_pairs() == [[1, 40], [2, 60], [3, None]]
    lineage.began(4, 30)
    assert lineage.as_pairs() == [[1, 30], [2, 30], [3, 30], [4, None]]
    lineage.broke()
    assert lineage.as_pairs() == []


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=6))
def test_a_step_is_of_the_lineage_if_no_later_attempt_began_before_it(attempts):
    lineage, starts = Lineage(), [start for start, _ in attempts]
    for number, start in enumerate(starts):
        lineage.began(number, start)
    for attempt, limit in lineage.as_pairs():
        later = starts[attempt + 1 :]
        for step in range(60):
            assert (limit is None or step <= limit) == all(start >= step for start in later)


# A run


class Watch:
    """A watchdog without any function."""

    def beat(self, _):
        pass

    def during(self, _):
        import contextlib

        return contextlib.nullcontext()


def run_of(directory, nodes, every=3, attempt=1, lineage=None, node="a", **switches):
    job = make_job(batch=16, attempt=attempt, **switches)
    job.config.failure.memory_every_steps = every
    job.config.checkpoint.extra_state = list(STATES)
    job.config.checkpoint.every_epochs = None
    job.channel.stop_requested = job.channel.save_requested = False
    job.channel.flush = lambda: None
    job = dataclasses.replace(job, run=RunIdentity("x", attempt, {}, lineage or {}))
    store = CheckpointStore(Storage.at(str(directory)))
    checkpoints = build_manager(job, store, nodes.links(node))
    checkpoints.begin_snapshots()
    return job, store, checkpoints


def stopping_at(job, step):
    for batch in job.data.feed.from_position(job.progress.position):
        yield batch
        if job.progress.step == step:
            return


def run_to_the_end(job, checkpoints):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.report", lambda _: None)
        run_steps(job, job.data.feed.from_position(job.progress.position), checkpoints, Watch())


def train_to(job, checkpoints, step):
    checkpoints.finish = lambda: None  # it is killed at that step
    run_steps(job, stopping_at(job, step), checkpoints, Watch())
    settled(checkpoints)


def steps_held(nodes, node="a"):
    return sorted(each["step"] for each in nodes.keepers[node].held())


def settled(checkpoints):
    if (thread := checkpoints._snapshots._thread) is not None:
        thread.join()


@pytest.fixture
def at_once(monkeypatch):
    """Complete each snapshot before training continues."""
    from ftexp.checkpoint.memory.snapshots import Snapshots

    begin = Snapshots._begin

    def joined(self, *arguments):
        begin(self, *arguments)
        self._thread.join()

    monkeypatch.setattr(Snapshots, "_begin", joined)


@pytest.mark.usefixtures("at_once")
def test_a_run_goes_on_from_memory_bitwise(tmp_path):
    nodes = Nodes("a")
    clean, _, checkpoints = run_of(tmp_path / "clean", Nodes("a"))
    run_to_the_end(clean, checkpoints)
    job, _, checkpoints = run_of(tmp_path / "killed", nodes)
    train_to(job, checkpoints, 11)
    assert steps_held(nodes) == [6, 9]
    state = np.random.get_state()[1].copy()
    again, store, checkpoints = run_of(tmp_path / "killed", nodes, attempt=2, lineage={1: None})
    assert restore(again, store, checkpoints) == "memory"
    assert again.progress.step == 9
    (restored,) = again.channel.events(events.Restored)
    assert (restored.source, restored.checkpoint, restored.step) == ("memory", "step_00000009.a1", 9)
    assert not (np.random.get_state()[1] == state).all()  # its generators have the state of step 9
    run_to_the_end(again, checkpoints)
    assert same(copied(again), copied(clean))
    assert again.progress.metrics == clean.progress.metrics


def killed_run(directory, nodes, step=11, **switches):
    job, store, checkpoints = run_of(directory, nodes, **switches)
    train_to(job, checkpoints, step)
    return job, store


def next_attempt(directory, nodes, lineage=None, **switches):
    """Restore in a second attempt; return (source, step)."""
    job, store, checkpoints = run_of(
        directory, nodes, attempt=2, lineage={1: None} if lineage is None else lineage, **switches
    )
    return restore(job, store, checkpoints), job.progress.step


@pytest.mark.usefixtures("at_once")
def test_storage_is_taken_where_its_checkpoint_is_newer_and_memory_where_it_is_not(tmp_path):
    nodes = Nodes("a")
    killed_run(tmp_path, nodes)
    saved, _, checkpoints = run_of(tmp_path, Nodes("a"), every=0)
    train_to_save(saved, checkpoints, 9)
    assert next_attempt(tmp_path, nodes) == ("memory", 9)
    saved, _, checkpoints = run_of(tmp_path, Nodes("a"), every=0)
    train_to_save(saved, checkpoints, 10)
    assert next_attempt(tmp_path, nodes) == ("storage", 10)


def train_to_save(job, checkpoints, step):
    for batch in stopping_at(job, step):
        train_step(job, batch)
        advance(job, batch)
    write(checkpoints)


def write(checkpoints):
    """Save a checkpoint and wait for it, without Ray's report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.report", lambda _: None)
        checkpoints.save()
        checkpoints.wait()


@pytest.mark.usefixtures("at_once")
def test_a_snapshot_that_is_not_as_it_was_written_gives_way_to_the_one_before(tmp_path):
    nodes = Nodes("a")
    killed_run(tmp_path, nodes)
    room = nodes.keepers["a"]._rooms["0/1"]
    newest = max(range(2), key=lambda number: sequence_of(room.slots[number]))
    room.maps[newest][PAGE + 5] ^= 1
    assert next_attempt(tmp_path, nodes) == ("memory", 6)
    for mapped in room.maps:
        mapped[PAGE + 9] ^= 1
    assert next_attempt(tmp_path, nodes) == ("start", 0)


@pytest.mark.usefixtures("at_once")
def test_what_a_run_goes_on_with_does_not_lie_in_the_slot_any_more(tmp_path):
    nodes = Nodes("a")
    killed_run(tmp_path, nodes)
    again, store, checkpoints = run_of(tmp_path, nodes, attempt=2, lineage={1: None})
    restore(again, store, checkpoints)
    before = copied(again)
    for mapped in nodes.keepers["a"]._rooms["0/1"].maps:
        mapped[:] = bytes(len(mapped))
    assert same(copied(again), before)
    assert all(value.any() for value in before)


@pytest.mark.usefixtures("at_once")
def test_replicas_are_compared_before_a_snapshot(tmp_path, monkeypatch):
    job, _, checkpoints = run_of(tmp_path, Nodes("a"), every=4)
    compared = []
    monkeypatch.setattr(
        "ftexp.worker.loop.ReplicaCheck.check", lambda _, saves: compared.append(job.progress.step) if saves else None
    )
    train_to(job, checkpoints, 9)
    assert compared == [4, 5, 8]  # step 4 only reserved memory


@pytest.mark.usefixtures("at_once")
def test_nothing_is_taken_from_memory_that_the_run_does_not_descend_from(tmp_path):
    nodes = Nodes("a")
    killed_run(tmp_path, nodes)
    nodes.calls.clear()
    assert next_attempt(tmp_path, nodes, lineage={}) == ("start", 0)
    assert nodes.calls == []
    assert next_attempt(tmp_path, nodes, lineage={1: 8}) == ("memory", 6)


@pytest.mark.usefixtures("at_once")
def test_a_keeper_that_dies_takes_its_snapshots_along_and_another_gets_new_ones(tmp_path, monkeypatch):
    nodes = Nodes("a")
    job, _, checkpoints = run_of(tmp_path, nodes)
    train_to(job, checkpoints, 7)
    assert steps_held(nodes) == [4, 6]  # step 3 only reserved memory
    lives = [False, True]
    monkeypatch.setattr(
        "ftexp.checkpoint.memory.snapshots._Room.keeper_lives", property(lambda _: lives.pop(0) if lives else True)
    )
    nodes.restart("a")
    assert next_attempt(tmp_path, nodes) == ("start", 0)
    train_to(job, checkpoints, 15)
    assert steps_held(nodes) == [12, 15]
    assert len(job.channel.events(events.SnapshotsBegun)) == 2


@pytest.mark.usefixtures("at_once")
def test_snapshots_for_which_there_is_no_room_are_off_and_that_is_said_once(tmp_path):
    nodes = Nodes("a", max_bytes=PAGE)
    job, _ = killed_run(tmp_path, nodes)
    (off,) = job.channel.events(events.SnapshotsOff)
    assert off.reason.startswith("two snapshots take")
    assert len([call for call in nodes.calls if call[2] == "reserve"]) == 1


def test_none_is_taken_where_what_it_goes_back_to_would_be_another(tmp_path):
    job, _, checkpoints = run_of(tmp_path, Nodes("a"))
    assert checkpoints._snapshots is not None
    job.config.failure.on_nonfinite = "rollback"
    other = build_manager(job, checkpoints._store, Nodes("a").links("a"))
    other.begin_snapshots()
    assert (other._snapshots, other.snapshot_due(), other.may_have_snapshots) == (None, False, False)
    job.config.failure.on_nonfinite = "raise"
    _, _, checkpoints = run_of(tmp_path, Nodes("a"), every=0)
    assert checkpoints._snapshots is None


def test_none_is_taken_while_a_save_is_under_way_or_due_or_the_loss_is_not_finite(tmp_path, monkeypatch):
    nodes = Nodes("a")
    job, _, checkpoints = run_of(tmp_path, nodes, every=1)
    asked = []
    monkeypatch.setattr(checkpoints._snapshots, "due", lambda step, saves: asked.append(saves) or False)
    checkpoints.snapshot_due()
    checkpoints._cadence.reasons.append("every_steps")
    checkpoints.snapshot_due()
    checkpoints._cadence.reasons.clear()
    monkeypatch.setattr(type(checkpoints), "busy", property(lambda _: True))
    checkpoints.snapshot_due()
    assert asked == [False, True, True]
    job.progress.train.add(torch.tensor([float("nan")]), torch.tensor([True]), torch.tensor([True]))
    checkpoints.take_snapshot(0.0)
    assert nodes.keepers["a"].held() == []


@pytest.mark.usefixtures("at_once")
def test_a_ledger_that_can_not_be_written_leaves_the_snapshot_out(tmp_path, monkeypatch):
    nodes = Nodes("a")
    job, _, checkpoints = run_of(tmp_path, nodes, ledger=True)

    def full():
        raise OSError(28, "No space left on device")

    train_to(job, checkpoints, 7)
    monkeypatch.setattr(job.ledger, "flush", full)
    train_to(job, checkpoints, 12)
    assert steps_held(nodes) == [4, 6]


@pytest.mark.usefixtures("at_once")
def test_the_next_node_has_a_copy_and_a_lost_one_loses_nothing(tmp_path):
    nodes = Nodes("a", "b", "c")
    job, _, checkpoints = run_of(tmp_path, nodes)
    checkpoints._snapshots._others = ["b", "c"]
    train_to(job, checkpoints, 11)
    assert [steps_held(nodes, node) for node in "abc"] == [[6, 9]] * 3
    assert ("c", "b", "read") in nodes.calls  # each node sends the data once
    nodes.lose("a")
    nodes.restart("d")
    assert next_attempt(tmp_path, nodes, node="d") == ("memory", 9)
    assert next_attempt(tmp_path, nodes, node="c") == ("memory", 9)
    for node in "bc":
        nodes.lose(node)
    assert next_attempt(tmp_path, nodes, node="d") == ("start", 0)


@pytest.mark.usefixtures("at_once")
def test_what_a_snapshot_costs_is_said_once(tmp_path):
    job, _ = killed_run(tmp_path, Nodes("a"), every=1)
    (taken,) = job.channel.events(events.SnapshotsTaken)
    assert (taken.every_steps, taken.bytes) == (1, job.channel.events(events.SnapshotsBegun)[0].bytes)
    assert taken.seconds > 0


def test_a_checkpoint_that_is_damaged_on_purpose_is_what_the_run_goes_on_from(tmp_path, monkeypatch):
    job, store, checkpoints = run_of(tmp_path, Nodes("a"), every=0)
    train_to_save(job, checkpoints, 5)
    fault = Fault("00-flip_byte", "flip_byte", 5, 0, 1, 0.0)
    chaos = Chaos([fault], job.group, job.progress, job.data.skipped, job.channel, Storage.at(str(tmp_path)))
    chaos.store = store
    monkeypatch.setattr("os.kill", lambda *_: None)
    chaos.strike(checkpoints, job.learner.model)
    assert ForgetSnapshots() in job.channel.sent


# The driver


class Hub:
    def __init__(self):
        self.taken = []

    def take(self, message):
        self.taken.append(message.event)
        return True


def ready():
    return Ready(0, total_steps=9, device="cpu", arguments={}, num_parameters=1)


def keepers_of(monkeypatch, *attempts, start=None, **failure):
    """Return the keepers started, and the hub's messages, for attempts whose ranks are on these nodes."""
    started, hub = [], Hub()
    monkeypatch.setattr("ftexp.driver.keepers._AFTER_S", 0.0)
    monkeypatch.setattr(
        "ftexp.driver.keepers.start_keepers", start or (lambda *given: started.append(given) or list(given[0]))
    )
    keepers = Keepers(FailureConfig(**failure), SimpleNamespace(runtime_env={}), hub)
    for nodes in attempts:
        before = set(threading.enumerate())
        for rank, node in enumerate(nodes):
            keepers.note(Hello(rank, len(nodes), 1, "host", ray_node=node))
        keepers.note(ready())
        for thread in set(threading.enumerate()) - before:
            thread.join()
    return started, hub.taken


def test_each_node_with_workers_has_one_keeper_however_many_attempts_there_are(monkeypatch):
    started, told = keepers_of(monkeypatch, "aab", "ba", "bc", memory_max_gb=0.5)
    assert started == [(["a", "b"], 500_000_000, {}), (["c"], 500_000_000, {})]
    assert told == []


@pytest.mark.parametrize("failure", [{"memory_every_steps": 0}, {"on_nonfinite": "rollback"}])
def test_a_run_without_snapshots_has_no_keepers(monkeypatch, failure):
    assert keepers_of(monkeypatch, "ab", **failure) == ([], [])


def test_none_is_started_once_the_run_has_ended(monkeypatch):
    started = []
    monkeypatch.setattr("ftexp.driver.keepers.start_keepers", lambda *given: started.append(given))
    keepers = Keepers(FailureConfig(), SimpleNamespace(runtime_env={}), Hub())
    keepers.close()
    monkeypatch.setattr(keepers._closed, "wait", lambda _: False)  # the wait is over
    keepers._start(["a"])
    assert started == []


def test_keepers_that_can_not_be_started_are_said_and_the_run_goes_on(monkeypatch):
    def fail(*_):
        raise ValueError("no")

    _, (off,) = keepers_of(monkeypatch, "a", start=fail)
    assert off == events.SnapshotsOff("ValueError: no")


def record_of(directory):
    return RunRecord(Storage.at(str(directory)), RunState(name="x"), ("val_loss", "min"))


def begun(record, ready_at, source="storage"):
    answer = record.handle(Hello(0, 1, 5, "host"))
    record.handle(dataclasses.replace(ready(), step=ready_at, source=source))
    record.handle(Tick(ready_at + 10, 0))
    return answer.lineage


def test_an_attempt_is_told_what_it_descends_from(tmp_path):
    record = record_of(tmp_path)
    assert begun(record, 0) == []
    record.fail("crash", 0, "gone")
    assert begun(record, 8, "memory") == [[1, None]]
    record.fail("hang", 0, "gone")
    assert begun(record, 5) == [[1, 8], [2, None]]
    for cause in ("corruption", "non_finite"):
        record.fail(cause, 0, "gone")
        assert begun(record, 5) == []
    record.handle(ForgetSnapshots())
    assert record.handle(Hello(0, 1, 5, "host")).lineage == []


def test_what_snapshots_cost_is_in_run_json(tmp_path):
    record = record_of(tmp_path)
    record.handle(Happened(events.SnapshotsTaken(44, 0.003, 0.0099, 19_000_000)))
    record.close("finished")
    assert read_state(record.storage).snapshots == {
        "every_steps": 44, "seconds": 0.003, "share": 0.0099, "bytes": 19_000_000,
    }  # fmt: skip


def test_a_save_by_the_clock_does_not_wait_longer_for_a_run_that_went_on_from_memory():
    clock = Clock()
    cadence = Cadence(CheckpointConfig(every_epochs=None, every_seconds=60), lambda value: value, clock)
    clock.now = 100.0
    cadence.resumed(50, saved_s_ago=59.0)
    clock.now += 2
    assert cadence.due(51, 0, epoch_ended=False, finished=False, busy=False)
    cadence.saved(51)
    clock.now += 2
    assert not cadence.due(52, 0, epoch_ended=False, finished=False, busy=False)


@pytest.mark.parametrize(("recovery", "word"), [("memory", "=1"), ("storage", "=0"), ("config", None)])
def test_a_drill_chooses_what_its_run_goes_on_from(recovery, word):
    own = drill.DrillConfig(recovery=recovery)
    words = [each for each in drill._broken_words(Config(), own, 60) if each.startswith("failure.memory_every_steps")]
    assert words == ([f"failure.memory_every_steps{word}"] if word else [])
    if word is not None:
        with pytest.raises(ConfigError, match=f"drill.recovery={recovery} sets it"):
            drill.refuse(["failure.memory_every_steps=3"], own)


def test_snapshots_and_a_rollback_to_the_last_save_conflict():
    config = Config(failure=FailureConfig(memory_every_steps=5, on_nonfinite="rollback"))
    assert any("memory_every_steps=5 conflicts with" in problem for problem in check_failure(config))
    config.failure.memory_every_steps = None  # auto, which then takes no snapshots
    assert list(check_failure(config)) == []
