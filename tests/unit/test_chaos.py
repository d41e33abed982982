"""Chaos: faults are planned, the same on all ranks, and occur once per run."""

import importlib
import json
import sys
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ftexp.chaos import strike as chaos
from ftexp.chaos.plan import planned_faults
from ftexp.chaos.strike import Chaos, ChaosError, FaultyStore, damage
from ftexp.checkpoint.manifest import FILES, Manifest
from ftexp.checkpoint.store import CheckpointStore
from ftexp.cli.compose import to_config
from ftexp.config.checks.validate import validate
from ftexp.config.schema import DAMAGES, FAULTS, ChaosConfig, config_dir
from ftexp.data.batches import Batch, MicroBatch
from ftexp.job.group import ProcessGroup
from ftexp.job.skipped_batches import SkippedBatches
from ftexp.rundir.names import CHAOS
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened, KillDriver
from ftexp.worker.loop import planned_chaos

CONTENT = {name: name.encode() * 50 for name in FILES}
OPTIONS = sorted(file.stem for file in (config_dir() / "chaos").glob("*.yaml"))


def plan(total_steps=100, **config):
    return [(fault.step, fault.kind) for fault in planned_faults(ChaosConfig(**config), total_steps)]


def test_one_fault_strikes_at_its_step_or_in_the_middle():
    assert plan(kind="raise", step=7) == [(7, "raise")]
    assert plan(kind="raise") == [(50, "raise")]
    assert plan(kind="raise", total_steps=1) == [(1, "raise")]
    assert plan() == []


def test_several_faults_are_spread_evenly_over_the_run():
    assert plan(faults=["raise", "kill_worker", "flip_byte"]) == [(25, "raise"), (50, "kill_worker"), (75, "flip_byte")]
    assert plan(kind="hang", faults=["raise"]) == [(33, "hang"), (66, "raise")]


def test_a_fault_may_say_its_own_step_rank_count_and_seconds():
    config = ChaosConfig(
        faults=[{"kind": "hang", "step": 90, "rank": 2, "seconds": 1.5}, {"kind": "disk_full", "step": 9, "count": 3}],
        rank=1,
        count=2,
        seconds=8.0,
    )
    first, second = planned_faults(config, 100)
    assert (first.kind, first.step, first.rank, first.count, first.seconds) == ("disk_full", 9, 1, 3, 8.0)
    assert (second.kind, second.step, second.rank, second.count, second.seconds) == ("hang", 90, 2, 2, 1.5)


def test_every_fault_of_a_run_has_a_name_of_its_own():
    faults = planned_faults(ChaosConfig(faults=[{"kind": "raise", "step": 5}] * 3), 100)
    assert len({fault.name for fault in faults}) == 3
    assert all(fault.kind in fault.name for fault in faults)


@given(
    seed=st.integers(0, 50), rate=st.floats(0, 1), kinds=st.lists(st.sampled_from(FAULTS), min_size=1, max_size=4),
    total=st.integers(1, 400),
)  # fmt: skip
def test_random_faults_follow_from_the_config_alone(seed, rate, kinds, total):
    config = ChaosConfig(kind="random", seed=seed, rate=rate, kinds=kinds)
    faults = planned_faults(config, total)
    assert faults == planned_faults(ChaosConfig(kind="random", seed=seed, rate=rate, kinds=list(kinds)), total)
    assert [fault.step for fault in faults] == sorted({fault.step for fault in faults})
    assert all(1 <= fault.step < total and fault.kind in kinds for fault in faults)
    assert len({fault.name for fault in faults}) == len(faults)
    # the faults of a longer run begin with the same ones
    assert planned_faults(config, 2 * total)[: len(faults)] == faults


def test_a_rate_of_0_strikes_never_1_always_and_another_seed_elsewhere():
    assert plan(kind="random", rate=0.0) == []
    assert plan(kind="random", rate=1.0) == [(step, "kill_worker") for step in range(1, 100)]
    some, others = (plan(10_000, kind="random", rate=0.1, seed=seed, kinds=["raise", "hang"]) for seed in (0, 1))
    assert 900 < len(some) < 1100
    assert some != others
    assert 0.4 < sum(kind == "raise" for _, kind in some) / len(some) < 0.6


def test_every_kind_has_an_option_and_every_option_is_a_kind():
    assert sorted(["none", "random", *FAULTS]) == OPTIONS


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_validates_and_plans_what_it_is_called(option):
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        config = to_config(hydra.compose("config", [f"chaos={option}"]))
    validate(config)
    kinds = {fault.kind for fault in planned_faults(config.chaos, 1000)}
    assert kinds == {"none": set(), "random": {"kill_worker"}}.get(option, {option})


def manifest(step):
    return Manifest(
        name=f"step_{step:08d}.a1", step=step, epoch=0, position=step, attempt=1, world_size=1, metrics={},
        state_versions={}, written_by="run 'x'", written_at=0.0, versions={}, fingerprint={},
    )  # fmt: skip


def save(store, step):
    return store.save(
        manifest(step), {name: lambda stream, name=name: stream.write(CONTENT[name]) for name in FILES}
    ).name


def contents(directory):
    return {name: directory.read_bytes(name) for name in directory.list_files()}


@pytest.mark.parametrize("place", ["local", "object store"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_does_what_it_says_and_no_more(tmp_path, memory, kind, place):
    store = CheckpointStore(Storage.at(str(tmp_path)) if place == "local" else Storage(memory))
    directory, other = (store.storage.child(save(store, step)) for step in (10, 20))
    before, untouched = contents(directory), contents(other)
    damage(directory, kind)
    after = contents(directory)
    if kind == "delete_checkpoint":
        assert not directory.exists()
    elif kind == "delete_manifest":
        assert after == {name: before[name] for name in FILES}
    elif kind == "truncate_checkpoint":
        assert after == {**before, "model.pt": before["model.pt"][: len(before["model.pt"]) // 2]}
    else:
        one, two = before.pop("optimizer.pt"), after.pop("optimizer.pt")
        assert after == before
        assert len(one) == len(two)
        assert sum((a ^ b).bit_count() for a, b in zip(one, two, strict=True)) == 1
    assert contents(other) == untouched


def test_a_damage_that_is_none_is_a_bug():
    with pytest.raises(AssertionError, match="kill_worker is no damage"):
        damage(Storage("/nowhere"), "kill_worker")


class Run:
    """The parts of one attempt's worker that Chaos uses, without Ray."""

    def __init__(self, directory, rank=0, world_size=2, total_steps=10, **config):
        self.sent, self.waited, self.killed = [], 0, []
        self.model = nn.Linear(3, 2)
        self.progress, self.skipped = SimpleNamespace(step=0), SkippedBatches()
        self.run_dir = Storage.at(str(directory))
        faults, group = planned_faults(ChaosConfig(**config), total_steps), ProcessGroup(rank, world_size, None)
        self.chaos = Chaos(faults, group, self.progress, self.skipped, self, self.run_dir)
        self.store = self.chaos.store

    def send(self, message):
        self.sent.append(message)

    def flush(self):
        self.sent.append("flushed")

    def wait(self):
        self.waited += 1

    def reach(self, step):
        self.progress.step = step
        self.chaos.strike(self, self.model)

    def told(self):
        return [message.event.fault for message in self.sent if message != "flushed"]


def test_an_exception_is_raised_once_in_a_run_and_told_before(tmp_path):
    run = Run(tmp_path, kind="raise", step=3)
    run.reach(2)
    assert run.sent == []
    with pytest.raises(ChaosError, match="chaos=raise at step 3 on rank 0"):
        run.reach(3)
    assert run.sent == [Happened(events.Chaos("raise", 0, 3)), "flushed"]
    assert run.run_dir.child(CHAOS).list_files() == ["00-raise"]
    again = Run(tmp_path, kind="raise", step=3)  # the next attempt replays the step
    again.reach(3)
    run.reach(3)
    assert again.sent == []


def test_a_weight_that_flips_changes_by_one_bit_and_no_other_does(tmp_path):
    run = Run(tmp_path, kind="flip_weight", step=3)
    before = [parameter.detach().clone().view(torch.int32) for parameter in run.model.parameters()]
    run.reach(3)
    after = [parameter.detach().view(torch.int32) for parameter in run.model.parameters()]
    changed = [(one ^ two).flatten().tolist() for one, two in zip(before, after, strict=True)]
    assert changed == [[1, 0, 0, 0, 0, 0], [0, 0]]


def test_two_faults_of_one_kind_at_one_step_are_two(tmp_path):
    faults = [{"kind": "raise", "step": 3}] * 2
    for _ in range(2):
        with pytest.raises(ChaosError):
            Run(tmp_path, faults=faults).reach(3)
    Run(tmp_path, faults=faults).reach(3)


@pytest.mark.parametrize(("wanted", "world_size", "struck"), [(0, 2, 0), (1, 2, 1), (5, 2, 1), (1, 1, 0), (2, 3, 2)])
def test_a_fault_strikes_one_rank_whatever_their_number(tmp_path, wanted, world_size, struck):
    told = []
    for rank in range(world_size):
        run = Run(tmp_path, rank, world_size, faults=[{"kind": "nonfinite", "step": 4, "rank": wanted}])
        run.reach(4)
        told += [rank] * len(run.told())
    assert told == [struck]


def micro_batch(start):
    return MicroBatch(torch.ones(2, 1, 4, 4), torch.zeros(2), torch.ones(2), np.arange(start, start + 2))


def test_the_next_batch_that_drives_an_update_is_poisoned_and_no_other(tmp_path):
    run = Run(tmp_path, kind="nonfinite", step=1)
    batches = [Batch(at, at + 4, [micro_batch(at), micro_batch(at + 2)], None, None) for at in (0, 4, 8, 12)]
    run.skipped.add((4, 8))
    poisoned = []
    for step, batch in enumerate(run.chaos.feeding(batch for batch in batches), start=1):
        poisoned += [[bool(micro.images.isnan().all()) for micro in batch.micro_batches]]
        run.reach(step)
    assert poisoned == [[False, False], [False, False], [True, False], [False, False]]
    assert all(micro.images.isfinite().all() for batch in batches for micro in batch.micro_batches)


def job_with(chaos):
    return SimpleNamespace(
        config=SimpleNamespace(chaos=chaos), total_steps=10, group=ProcessGroup(0, 1, None),
        progress=None, data=SimpleNamespace(skipped=None), channel=None,
    )  # fmt: skip


def test_a_run_without_faults_loads_nothing_of_what_makes_them():
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "ftexp"}
    for name in ours:
        del sys.modules[name]
    try:
        importlib.import_module("ftexp.worker.loop")
        assert "ftexp.worker.step" in sys.modules
        assert "ftexp.chaos.strike" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "ftexp"]:
            del sys.modules[name]
        sys.modules.update(ours)


def test_chaos_is_made_where_faults_are_planned_and_nowhere_else(tmp_path, monkeypatch):
    run_dir = Storage.at(str(tmp_path))
    assert planned_chaos(job_with(ChaosConfig(kind="raise")), run_dir).store.storage.uri == f"{tmp_path}/checkpoints"
    monkeypatch.setitem(sys.modules, "ftexp.chaos.strike", None)  # importing it is an error
    assert planned_chaos(job_with(ChaosConfig()), run_dir) is None
    assert planned_chaos(job_with(ChaosConfig(kind="random", rate=0.0)), run_dir) is None


@pytest.mark.parametrize("kind", ["disk_full", "slow_storage"])
@pytest.mark.parametrize("rank", [0, 1])
def test_storage_fails_where_the_writing_is_done(tmp_path, kind, rank):
    faults = [{"kind": kind, "step": 4, "rank": 1, "count": 2, "seconds": 0.25}]
    follower = Run(tmp_path, rank=1, faults=faults)
    follower.reach(4)
    assert (follower.sent, follower.run_dir.child(CHAOS).list_files()) == ([], [])
    assert (follower.store.num_failing, follower.store.num_slow) == (0, 0)
    leader = Run(tmp_path, rank=0, faults=faults)
    leader.reach(4)
    assert leader.told() == [kind]
    assert (leader.store.num_failing, leader.store.num_slow) == ((2, 0) if kind == "disk_full" else (0, 2))
    assert leader.store.delay_s == (0.25 if kind == "slow_storage" else 0.0)
    again = Run(tmp_path, rank=0, faults=faults)
    again.reach(4)
    assert (again.store.num_failing, again.store.num_slow) == (0, 0)


def test_a_full_disk_fails_so_many_saves_and_leaves_the_ones_before(tmp_path):
    store = FaultyStore(Storage.at(str(tmp_path)))
    save(store, 10)
    store.num_failing = 2
    for step in (20, 30):
        with pytest.raises(OSError, match=r"No space left on device \(chaos\)"):
            save(store, step)
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000010.a1"]
    save(store, 40)
    assert [m.step for m in store.manifests(lambda *_: None)] == [40, 10]
    store.verify(store.by_name("step_00000040.a1"))


def test_slow_storage_makes_so_many_saves_take_longer(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(chaos.time, "sleep", slept.append)
    store = FaultyStore(Storage.at(str(tmp_path)))
    store.num_slow, store.delay_s = 2, 7.5
    for step in (10, 20, 30):
        save(store, step)
    assert slept == [7.5, 7.5]
    assert store.latest(lambda *_: None).step == 30


def test_a_hang_lasts_as_long_as_it_is_told_to(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(chaos.time, "sleep", slept.append)
    Run(tmp_path, kind="hang", step=4, seconds=12.5).reach(4)
    assert slept == [12.5]


def test_a_slow_rank_takes_longer_for_so_many_steps(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(chaos.time, "sleep", slept.append)
    for rank in (0, 1):
        run = Run(tmp_path, rank=rank, kind="slow_rank", step=4, count=2, seconds=0.25)
        batches = run.chaos.feeding(SimpleNamespace(start=number) for number in range(5))
        next(batches)
        run.reach(4)
        assert slept == []
        assert [batch.start for batch in batches] == [1, 2, 3, 4]
        assert slept == ([0.25, 0.25] if rank == 0 else [])
        slept.clear()


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("count", [1, 2])
def test_damage_hits_the_newest_checkpoints_once_they_are_written_and_then_kills(tmp_path, monkeypatch, kind, count):
    run = Run(tmp_path, kind=kind, step=35, count=count, total_steps=100)
    monkeypatch.setattr(chaos.os, "kill", lambda pid, number: run.killed.append((pid, number)))
    names = [save(run.store, step) for step in (10, 20)]
    monkeypatch.setattr(run, "wait", lambda: names.append(save(run.store, 30)))  # a checkpoint was in flight
    run.reach(35)
    assert run.sent[0].event.damaged == names[::-1][:count]
    assert run.killed == [(chaos.os.getpid(), chaos.signal.SIGKILL)]
    assert run.store.latest(lambda *_: None).step == 30 - 10 * count


def test_killing_a_worker_waits_for_no_save(tmp_path, monkeypatch):
    run = Run(tmp_path, kind="kill_worker", step=4)
    monkeypatch.setattr(chaos.os, "kill", lambda pid, number: run.killed.append((pid, number)))
    run.reach(4)
    assert (run.waited, run.killed) == (0, [(chaos.os.getpid(), chaos.signal.SIGKILL)])


@pytest.mark.parametrize("kind", ["kill_driver", "half_snapshot"])
def test_the_driver_is_asked_to_kill_itself(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(chaos.time, "sleep", lambda seconds: None)  # the driver's death would end the sleep
    run = Run(tmp_path, kind=kind, step=4)
    run.run_dir.write_bytes(chaos.ray_private.SNAPSHOT, b"0123456789")
    run.reach(4)
    assert run.sent[-1] == KillDriver()
    left = run.run_dir.read_bytes(chaos.ray_private.SNAPSHOT)
    if kind == "half_snapshot":
        with pytest.raises(json.JSONDecodeError):
            json.loads(left)
    else:
        assert left == b"0123456789"
