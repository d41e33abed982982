"""Program of tests/ray/test_sharded_checkpoints.py: ranks save a sharded model, and other numbers of ranks resume.

    python -m tests.support.saving_ranks DIRECTORY_OR_URI

- Two ranks save, in shards and as one file.
- Four ranks reject the newest checkpoint, which has a corrupt shard, resume from the one before and save.
- Four ranks in two replicas save; each byte is written once.
- One rank and three ranks resume from these checkpoints.
- Of two ranks, one can't write, and later one dies while writing: neither leaves a checkpoint.
- On an object store, which is slower, only two ranks save and three resume.
"""

import functools
import io
import os
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray.train
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ftexp.checkpoint.compare import tree_differences
from ftexp.checkpoint.manifest import EXTRA, FILES, MODEL, OPTIMIZER, shard_file
from ftexp.checkpoint.reading import read_parts
from ftexp.checkpoint.registry import register_state
from ftexp.checkpoint.restore import restore
from ftexp.checkpoint.sharding import gathered
from ftexp.checkpoint.store import CheckpointStore
from ftexp.job.group import ProcessGroup
from ftexp.model.optim import build_optimizer
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage
from ftexp.wire import events
from tests.support.jobs import make_job, manager_of

CPU = torch.device("cpu")


@register_state("shadow")
class Shadow:
    """A state that is sharded like the model, as an EMA is."""

    version = 1

    def __init__(self, context):
        self.weights = {name: value.detach().clone() for name, value in context.model.state_dict().items()}

    def state_dict(self):
        return {"weights": self.weights, "count": 3}

    def load_state_dict(self, state):
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)


def job_on(rank, sizes, seed):
    """Return a job whose model is sharded over the last dimension of a mesh of these sizes."""
    world = functools.reduce(lambda one, other: one * other, sizes)
    job = make_job(group=ProcessGroup(rank, world, CPU))
    learner = job.learner
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.normal_()
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    for block in learner.model.blocks:
        fully_shard(block, mesh=mesh)
    learner.wrapped = fully_shard(learner.model, mesh=mesh)
    learner.optimizer = build_optimizer(job.config.optim, job.config.train, learner.model)
    return job


def train(job, rank):
    torch.manual_seed(100 + rank)
    for _ in range(2):
        job.learner.model(torch.randn(3, 1, 8, 8)).square().mean().backward()
        job.learner.before_change()
        job.learner.optimizer.step()
        job.learner.optimizer.zero_grad()
        job.progress.step += 1


def whole(job, checkpoints):
    """Return the contents of a checkpoint of this job, gathered on every rank."""
    state = (job.learner.model.state_dict(), job.learner.optimizer.state_dict(), checkpoints._extra.state_dict())
    return dict(zip(FILES, gathered(state, keeps=True), strict=True))


def same(first, second):
    found = list(tree_differences(first, second))
    assert not found, found[:5]


def saved_whole(rank, where, sizes, into):
    """Train and save as `saved` does, but with checkpoint.format=full, gathered by rank 0."""
    job = job_on(rank, sizes, seed=1)
    job.config.checkpoint.format = "full"
    checkpoints, store = manager_of(job, where, ("progress", "shadow"))
    train(job, rank)
    checkpoints.save()
    expected = whole(job, checkpoints)
    checkpoints.finish()
    if rank == 0:
        torch.save(expected, into)
        (manifest,) = store.manifests(lambda *_: None)
        assert [*manifest.files] == [*FILES]
        same(read_parts(store, manifest, FILES), expected)


def saved(rank, where, sizes, into):
    """Train and save a checkpoint; write the expected contents to the file `into`."""
    job = job_on(rank, sizes, seed=1)
    checkpoints, store = manager_of(job, where, ("progress", "shadow"))
    train(job, rank)
    write, trained = store.write, threading.Event()

    def late(name, files):
        trained.wait()
        return write(name, files)

    if rank:  # so that one rank writes the trained tensors themselves, and the other a copy
        store.write = late
    checkpoints.save()
    expected = whole(job, checkpoints)
    train(job, rank)  # none of it must reach the checkpoint in flight
    trained.set()
    checkpoints.finish()
    if rank == 0:
        torch.save(expected, into)
        (event,) = job.channel.events(events.CheckpointSaved)
        manifest = store.by_name(event.checkpoint)
        num_shards = sizes[-1]
        files = {shard_file(part, number, num_shards) for part in FILES for number in range(num_shards)}
        assert {*manifest.files} == files | {EXTRA}, manifest.files
        assert dict(store.storage.child(manifest.name).sizes()).keys() == {*manifest.files, "manifest.json"}
        assert manifest.mesh["num_shards"] == num_shards
        assert [*manifest.mesh["dims"].values()] == list(sizes)
        tensors = [value for part in (MODEL, OPTIMIZER, EXTRA) for value in _sharded(expected, part)]
        written = sum(each["bytes"] - each["header_bytes"] for name, each in manifest.files.items() if name != EXTRA)
        assert written == sum(value.nbytes for value in tensors), "each byte once"
        same(read_parts(store, manifest, FILES), expected)


def _sharded(expected, part):
    if part == MODEL:
        return list(expected[MODEL].values())
    if part == EXTRA:
        return list(expected[EXTRA]["shadow"]["weights"].values())
    return [value for state in expected[OPTIMIZER]["state"].values() for key, value in state.items() if key != "step"]


def resumed(rank, where, sizes, source):
    """Resume from the newest checkpoint, compare with the file `source`, then train on and roll back."""
    job = job_on(rank, sizes, seed=2)
    job.config.failure.on_nonfinite = "rollback"
    checkpoints, store = manager_of(job, where, ("progress", "shadow"))
    restore(job, store, checkpoints)
    expected = torch.load(source, weights_only=True)
    same(whole(job, checkpoints), expected)
    assert isinstance(next(job.learner.model.parameters()), DTensor)
    assert isinstance(job.learner.optimizer.state_dict()["state"][0]["exp_avg"], DTensor)
    checkpoints.keep_in_memory()
    train(job, rank)
    checkpoints.roll_back()
    same(whole(job, checkpoints), expected)
    return job, checkpoints, store


def resumed_past_damage(rank, where, sizes, source):
    store = CheckpointStore(Storage.at(where))
    if rank == 0:  # add a newer checkpoint with a corrupt file that only other ranks read
        (older,) = store.manifests(lambda *_: None)
        directory = store.storage.child(older.name)
        files = {name: directory.read_bytes(name) for name in older.files}
        name = "optimizer.00001-of-00002.safetensors"
        copied = {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])}
        newer = type(older)(**{**vars(older), "name": "step_00000099.a1", "step": 99})
        for each, content in copied.items():
            store.storage.child(newer.name).draft.write_bytes(each, content)
        store.commit(newer)
    dist.barrier()
    job, checkpoints, store = resumed(rank, where, sizes, source)
    if rank == 0:
        (rejected,) = job.channel.events(events.CheckpointRejected)
        assert rejected.checkpoint == "step_00000099.a1", rejected
        assert rejected.reason == f"{name} differs from its BLAKE3", rejected
        (event,) = job.channel.events(events.Restored)
        assert (event.rejected, event.checkpoint) == (1, older.name), event
        assert store.storage.list_directories() == [older.name]
    job.progress.step, job.progress.position = job.progress.step + 1, job.progress.total_positions
    checkpoints.save()
    expected = whole(job, checkpoints)
    checkpoints.finish()
    if rank == 0:  # the run has ended, so there is a model.pt
        torch.save(expected, source)
        newest = store.manifests(lambda *_: None)[0]
        assert MODEL in newest.files
        same(torch.load(io.BytesIO(store.read_file(newest, MODEL)), weights_only=True), expected[MODEL])


def failing(rank, where, sizes, _):
    """Save with a full disk on one rank; later with a rank that dies while writing."""
    job = job_on(rank, sizes, seed=1)
    checkpoints, store = manager_of(job, where, ("progress", "shadow"))
    write = store.write

    def full(name, files):
        raise OSError(28, "No space left on device")

    def dying(name, files):
        directory = store.storage.child(name).draft
        directory.write_bytes(next(iter(files)), b"half of it")
        os._exit(9)

    if rank == 1:
        store.write = full
    checkpoints.save()
    checkpoints.wait()
    failed = [event.error for event in job.channel.events(events.CheckpointFailed)]
    assert failed == (["rank 1: [Errno 28] No space left on device"] if rank == 0 else []), failed
    assert store.storage.list_directories() == []
    store.write = write
    job.progress.step += 1
    checkpoints.save()
    checkpoints.wait()
    assert len(store.storage.list_directories()) == 1
    if rank == 1:
        store.write = dying
    job.progress.step += 1
    checkpoints.save()
    with pytest.raises(RuntimeError, match=r"peer|onnection"):
        checkpoints.wait()
    assert [each.step for each in store.candidates(lambda *_: None)] == [1]
    os._exit(0)  # the barrier after this function would fail too, perhaps before the other rank's exit is noticed


def _as_rank(rank, world, meeting, calls):
    torch.set_num_threads(1)
    ray.train.report = lambda metrics: None
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{meeting}")
    for function, where, sizes, *arguments in calls:
        function(rank, where, sizes, *arguments)
        dist.barrier()
    dist.destroy_process_group()


def together(world, *calls):
    """Run calls on `world` ranks in sequence; a call is (function, directory, sizes of the mesh, *arguments)."""
    torch.multiprocessing.start_processes(
        _as_rank, args=(world, tempfile.mktemp(), calls), nprocs=world, start_method="fork"
    )


def main(uri):
    storage = Storage.at(uri)
    where = {name: storage.child(name, CHECKPOINTS).uri for name in ("two", "whole", "replicas", "failing")}
    with tempfile.TemporaryDirectory() as directory:
        kept = {name: str(Path(directory) / name) for name in where}
        saving = (saved, where["two"], (2,), kept["two"])
        if storage.local_path is None:
            together(2, saving)
            together(3, (resumed, where["two"], (3,), kept["two"]))
        else:
            together(2, saving, (saved_whole, where["whole"], (2,), kept["whole"]))
            damaged = (resumed_past_damage, where["two"], (4,), kept["two"])
            together(4, damaged, (saved, where["replicas"], (2, 2), kept["replicas"]))
            together(1, (resumed, where["two"], (1,), kept["two"]))
            together(3, *((resumed, where[name], (3,), kept[name]) for name in ("whole", "replicas")))
            with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 9"):
                together(2, (failing, where["failing"], (2,), None))
    print("as it was saved")


if __name__ == "__main__":
    main(sys.argv[1])
