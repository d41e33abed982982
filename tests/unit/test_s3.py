"""An S3 object store is as safe as a disk, also during an outage."""

import json

import pytest

from ftexp.checkpoint.manifest import FILES, MANIFEST, Manifest
from ftexp.checkpoint.store import REJECTED, CheckpointStore, locate
from ftexp.errors import CheckpointError, RunInUseError
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.append_log import AppendLog
from ftexp.storage.lease import LEASE_FILE, Lease

CONTENT = {name: name.encode() * 50 for name in FILES}
WRITERS = {name: lambda stream, content=content: stream.write(content) for name, content in CONTENT.items()}


def manifest(step):
    return Manifest(
        name=f"step_{step:08d}.a1", step=step, epoch=0, position=step * 32, attempt=1, world_size=2, metrics={},
        state_versions={"progress": 1}, written_by="run 'x'", written_at=1.5, versions={}, fingerprint={"seed": 0},
    )  # fmt: skip


def everything(storage):
    """Return the sorted paths of all objects under a directory."""
    from pyarrow.fs import FileSelector, FileType

    filesystem, root = storage.open()
    infos = filesystem.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{root}/") for info in infos if info.type == FileType.File)


def test_a_checkpoint_on_s3_counts_only_while_it_is_whole(s3):
    store = CheckpointStore(s3.child(CHECKPOINTS))
    for step in (1, 2, 3):
        store.save(manifest(step), WRITERS)
    whole = [f"step_0000000{step}.a1/{name}" for step in (1, 2, 3) for name in sorted([*FILES, MANIFEST])]
    assert everything(store.storage) == whole
    # two incomplete checkpoints, and one that is corrupt
    for torn in ("step_00000004.a1", "step_00000005.a1"):
        store.storage.child(torn).write_bytes("model.pt", b"half of it")
    store.storage.child("step_00000003.a1").write_bytes("optimizer.pt", CONTENT["optimizer.pt"][:-1] + b"?")
    rejected = {}
    assert store.latest(rejected.__setitem__).step == 2
    assert rejected == {
        "step_00000005.a1": "it has no manifest",
        "step_00000004.a1": "it has no manifest",
        "step_00000003.a1": "optimizer.pt differs from its BLAKE3",
    }
    for name in rejected:
        store.quarantine(name)
    moved = [f"{REJECTED}/step_00000003.a1.0/{name}" for name in sorted([*FILES, MANIFEST])]
    assert everything(store.storage) == moved + whole[:8]
    assert store.storage.list_directories() == ["step_00000001.a1", "step_00000002.a1"]
    assert store.latest(lambda *_: pytest.fail("nothing is left to reject")).step == 2
    assert store.read(store.by_name("step_00000002.a1")) == CONTENT
    store.delete_all_but(["step_00000002.a1"])
    assert everything(store.storage) == moved + whole[4:8]
    assert locate(s3.uri)[1].step == 2

    # reading a removed file fails with the reason
    store.storage.child("step_00000002.a1").delete_file("model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt can't be read \(FileNotFoundError\)"):
        store.verify(store.by_name("step_00000002.a1"))
    s3.write_bytes(".tmp-run.json", b"torn")
    s3.child(".tmp-step").write_bytes("model.pt", b"torn")
    s3.child("kept").write_bytes("file", b"")
    assert s3.sweep() == [".tmp-run.json", ".tmp-step"]
    s3.child(CHECKPOINTS).delete()
    s3.child("never").delete()
    assert everything(s3) == ["kept/file"]


def test_lines_on_s3_outlive_their_writer_up_to_the_last_flush(s3):
    log = AppendLog(s3, "log.jsonl")
    log.append("one")
    log.flush()
    log.append("lost with its writer")
    log = AppendLog(s3, "log.jsonl")
    log.append("two")
    log.close()
    assert s3.read_bytes("log.jsonl") == b"one\ntwo\n"


def test_a_run_on_s3_has_one_driver_at_a_time(s3):
    first = Lease.take(s3, beat_s=0.05, watch_s=5)
    said = []
    with pytest.raises(RunInUseError, match="in use by process"):
        Lease.take(s3, said.append, beat_s=0.05, watch_s=5)
    assert "still alive?" in said[0]
    first.release()
    assert not s3.exists(LEASE_FILE)

    # a claim of a dead owner is taken over; an owner that was not dead after all notices that
    dead = Lease.take(s3, beat_s=3600, watch_s=0.3)
    second = Lease.take(s3, said.append, beat_s=0.05, watch_s=0.3)
    assert json.loads(s3.read_bytes(LEASE_FILE))["token"] == second._token
    dead.release()
    second.release()
