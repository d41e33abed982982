"""The store: incomplete and corrupt checkpoints are rejected, and the newest good one is always found."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil

import pytest
import torch
from blake3 import blake3

from ftexp.chaos import strike as chaos
from ftexp.checkpoint.manifest import FILES, MANIFEST, Manifest, content_hash, kept_names
from ftexp.checkpoint.manifest import sha256_of as _sha256_of
from ftexp.checkpoint.staging import load_part, writer
from ftexp.checkpoint.store import REJECTED, CheckpointStore, locate
from ftexp.cli.trained_run import choose
from ftexp.config.schema import DAMAGES, Config
from ftexp.errors import CheckpointError, ConfigError
from ftexp.evaluate.command import EvaluateConfig, evaluate
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage

CONTENT = {name: name.encode() * 50 for name in FILES}


def writing(content):
    """Return a function that writes these bytes to a stream."""
    return lambda stream: stream.write(content)


WRITERS = {name: writing(content) for name, content in CONTENT.items()}


def manifest(step, attempt=1, **changes):
    fields = {
        "name": f"step_{step:08d}.a{attempt}",
        "step": step,
        "epoch": step // 10,
        "position": step * 32,
        "attempt": attempt,
        "world_size": 2,
        "metrics": {"val_accuracy": step / 1000},
        "state_versions": {"progress": 1},
        "written_by": "run 'x'",
        "written_at": 1_700_000_000.25,
        "versions": {"torch": "2"},
        "fingerprint": {"seed": 0, "optim.lr": 1e-3, "model.kwargs": {}, "data.mean": [0.5]},
    }
    return Manifest(**{**fields, **changes})


def files_under(directory):
    """Return {path: content} of all files in a directory, including hidden ones."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(Storage.at(str(tmp_path / "checkpoints")))


def never(name, reason):
    raise AssertionError(f"{name} was rejected: {reason}")


def test_what_was_saved_comes_back(store):
    saved = store.save(manifest(10), WRITERS)
    found = store.latest(never)
    assert found == saved == store.by_name(saved.name)
    assert dataclasses.replace(found, files={}) == manifest(10)
    assert store.read(found) == CONTENT
    assert store.read_file(found, "optimizer.pt") == CONTENT["optimizer.pt"]
    assert saved.files["model.pt"]["bytes"] == len(CONTENT["model.pt"])
    assert saved.num_bytes == sum(map(len, CONTENT.values()))


@pytest.mark.parametrize("place", ["local", "object store"])
def test_the_manifest_holds_size_and_blake3_of_the_bytes_that_arrived(store, memory, place):
    if place == "object store":
        store = CheckpointStore(Storage(memory))
    part = {"weights": torch.arange(3000.0), "name": "x"}
    pieces = [b"", b"abc", memoryview(bytes(range(256)) * 5000), memoryview(torch.arange(6).numpy())]
    saved = store.save(
        manifest(10),
        {
            "model.pt": writer(part),
            "optimizer.pt": lambda stream: [stream.write(piece) for piece in pieces],
            "extra_state.pt": lambda stream: None,
        },
    )
    for name in FILES:
        content = store.storage.child(saved.name).read_bytes(name)
        assert saved.files[name] == {"bytes": len(content), "blake3": blake3(content).hexdigest()}
    assert torch.equal(load_part("model.pt", store.read_file(saved, "model.pt"))["weights"], part["weights"])
    assert store.read_file(saved, "optimizer.pt") == b"".join(map(bytes, pieces))
    assert store.read_file(saved, "extra_state.pt") == b""


def test_an_object_store_gives_back_what_was_saved_and_rejects_what_is_damaged(memory):
    store = CheckpointStore(Storage(memory).child("checkpoints"))
    for step in (10, 20):
        store.save(manifest(step), WRITERS)
    assert store.latest(never).step == 20
    chaos.damage(store.storage.child("step_00000020.a1"), "flip_byte")
    rejected = {}
    assert store.latest(rejected.__setitem__).step == 10
    assert rejected == {"step_00000020.a1": "optimizer.pt differs from its BLAKE3"}


def test_an_object_store_that_does_not_answer_is_no_damage(memory, monkeypatch):
    store = CheckpointStore(Storage(memory))
    saved = store.save(manifest(10), WRITERS)
    monkeypatch.setattr(Storage, "reading", lambda self, name: (_ for _ in ()).throw(OSError("no route to host")))
    for ask in (lambda: store.latest(never), lambda: store.verify(saved), lambda: store.read(saved)):
        with pytest.raises(OSError, match="no route to host"):
            ask()


def test_a_mount_that_does_not_answer_is_no_damage_and_a_disk_that_cannot_read_is(store, monkeypatch):
    store.save(manifest(10), WRITERS)
    store.save(manifest(20), WRITERS)
    reading = Storage.reading

    def failing(number):
        def fail(self, name):
            if name == "optimizer.pt" and self.name == manifest(20).name:
                raise OSError(number, os.strerror(number))
            return reading(self, name)

        monkeypatch.setattr(Storage, "reading", fail)

    for number in (errno.ESTALE, errno.EMFILE, errno.EACCES):
        failing(number)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            store.latest(never)
    failing(errno.EIO)
    rejected = {}
    assert store.latest(rejected.__setitem__).step == 10
    assert rejected == {manifest(20).name: "optimizer.pt can't be read (OSError)"}


def test_latest_is_the_highest_step_not_the_last_written_nor_the_last_name(store):
    for step, attempt in ((20, 1), (30, 2), (10, 3)):
        store.save(manifest(step, attempt), WRITERS)
    assert store.latest(never).step == 30
    assert [m.step for m in store.manifests(never)] == [30, 20, 10]


def test_an_empty_or_missing_folder_has_no_latest(store):
    assert store.latest(never) is None


def truncate(directory):
    (directory / "optimizer.pt").write_bytes(CONTENT["optimizer.pt"][:-1])


def flip_a_byte(directory):
    content = bytearray((directory / "model.pt").read_bytes())
    content[7] ^= 1
    (directory / "model.pt").write_bytes(bytes(content))


def delete_manifest(directory):
    (directory / MANIFEST).unlink()


def tear_manifest(directory):
    (directory / MANIFEST).write_bytes((directory / MANIFEST).read_bytes()[:40])


def delete_a_file(directory):
    (directory / "extra_state.pt").unlink()


def empty_the_folder(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def rename_the_folder(directory):
    directory.rename(directory.with_name("step_00009999.a9"))


def forget_a_file_in_the_manifest(directory):
    content = json.loads((directory / MANIFEST).read_text())
    del content["files"]["optimizer.pt"], content["sha256"]
    (directory / MANIFEST).write_text(json.dumps({**content, "sha256": _sha256_of(content)}))


DAMAGE = [
    (truncate, "optimizer.pt has"),
    (flip_a_byte, "model.pt differs from its BLAKE3"),
    (delete_manifest, "it has no manifest"),
    (tear_manifest, "its manifest can't be read (JSONDecodeError)"),
    (delete_a_file, "extra_state.pt can't be read (FileNotFoundError)"),
    (empty_the_folder, "it has no manifest"),
    (rename_the_folder, "its manifest can't be read (ValueError)"),
    (forget_a_file_in_the_manifest, "optimizer.pt isn't in the manifest"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
@pytest.mark.parametrize("num_damaged", [1, 2])
def test_damage_is_noticed_and_the_one_before_is_taken(store, damage, reason, num_damaged):
    for step in (10, 20, 30):
        store.save(manifest(step), WRITERS)
    if damage is rename_the_folder and num_damaged == 2:
        num_damaged = 1  # both would get the same name
    for step in (30, 20)[:num_damaged]:
        damage(store.storage.local_path / f"step_{step:08d}.a1")
    rejected = {}
    found = store.latest(rejected.__setitem__)
    assert (found.step, store.read(found)) == (30 - 10 * num_damaged, CONTENT)
    assert len(rejected) == num_damaged
    assert all(reason in text for text in rejected.values())


CHAOS_REASON = {
    "truncate_checkpoint": f"model.pt has {len(CONTENT['model.pt']) // 2} bytes, not {len(CONTENT['model.pt'])}",
    "flip_byte": "optimizer.pt differs from its BLAKE3",
    "delete_manifest": "it has no manifest",
    "delete_checkpoint": None,  # no directory is left to reject
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("num_damaged", [1, 2])
def test_no_damage_that_chaos_does_gets_past_verification(store, kind, num_damaged):
    saved = [store.save(manifest(step), WRITERS) for step in (10, 20, 30)]
    damaged = saved[3 - num_damaged :]
    for one in damaged:
        chaos.damage(store.storage.child(one.name), kind)
    rejected = {}
    found = store.latest(rejected.__setitem__)
    assert (found, store.read(found)) == (saved[2 - num_damaged], CONTENT)
    assert rejected == ({one.name: CHAOS_REASON[kind] for one in damaged} if CHAOS_REASON[kind] else {})
    if kind != "delete_manifest":  # a manifest that was read earlier lists the expected files
        for one in damaged:
            for check in (store.verify, store.read):
                with pytest.raises(CheckpointError, match=r"\.pt (has|differs|can't be read)"):
                    check(one)


def test_one_file_is_verified_by_itself(store):
    saved = store.save(manifest(10), WRITERS)
    chaos.damage(store.storage.child(saved.name), "flip_byte")
    assert store.read_file(saved, "model.pt") == CONTENT["model.pt"]
    with pytest.raises(CheckpointError, match=r"optimizer\.pt differs from its BLAKE3"):
        store.read_file(saved, "optimizer.pt")


def test_a_half_written_checkpoint_is_not_seen(store):
    store.save(manifest(10), WRITERS)
    half = store.storage.local_path / ".tmp-step_00000020.a1"
    half.mkdir()
    (half / "model.pt").write_bytes(b"half")
    assert store.latest(never).step == 10
    store.save(manifest(20), WRITERS)  # the same name again, over the files of the dead process
    assert store.latest(never).step == 20
    assert not half.exists()


def losing_a_byte(writing):
    """Return a `writing` that silently loses the last byte of model.pt."""

    @contextlib.contextmanager
    def write(self, name):
        with writing(self, name) as stream:
            yield stream
        if name == "model.pt":
            (self.local_path / name).write_bytes((self.local_path / name).read_bytes()[:-1])

    return write


def test_a_save_that_reads_back_wrong_is_an_error_not_a_checkpoint_to_trust(store, monkeypatch):
    monkeypatch.setattr(Storage, "writing", losing_a_byte(Storage.writing))
    with pytest.raises(CheckpointError, match=r"model\.pt has"):
        store.save(manifest(10), WRITERS)


def test_a_save_that_read_back_wrong_can_be_tried_again(store, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "writing", losing_a_byte(Storage.writing))
        with pytest.raises(CheckpointError, match=r"model\.pt has"):
            store.save(manifest(10), WRITERS)
    saved = store.save(manifest(10), WRITERS)
    assert store.latest(never) == saved
    assert [path.name for path in store.storage.local_path.iterdir() if path.name.startswith(".tmp-")] == []


class Full:
    """A file on a disk with `room` bytes left."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, data):
        data = memoryview(data).cast("B")
        if data.nbytes > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= data.nbytes
        return self.stream.write(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def on_a_full_disk(write):
    return lambda stream: write(Full(stream, 1000))


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize(
    "write",
    [
        writing(b"x" * 1001),
        pytest.param(
            writer({"weights": torch.zeros(1000)}),
        ),
    ],
    ids=["bytes", "torch.save"],
)
def test_a_full_disk_is_an_oserror_that_leaves_older_checkpoints_and_nothing_half_written(store, failing, write):
    saved = store.save(manifest(10), WRITERS)
    before = files_under(store.storage.local_path)
    with pytest.raises(OSError, match="No space left"):
        store.save(manifest(20), {**WRITERS, failing: on_a_full_disk(write)})
    assert files_under(store.storage.local_path) == before
    assert store.latest(never) == saved


def test_a_manifest_that_can_not_be_written_leaves_nothing_either(store, monkeypatch):
    store.save(manifest(10), WRITERS)
    before = files_under(store.storage.local_path)
    fsync, synced = os.fsync, []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == len(FILES) + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("ftexp.storage.directory.os.fsync", full)
    monkeypatch.setattr("ftexp.storage.directory._sync_directory", lambda path: None)
    with pytest.raises(OSError, match="No space left"):
        store.save(manifest(20), WRITERS)
    assert files_under(store.storage.local_path) == before


def test_a_write_that_fails_on_an_object_store_leaves_nothing_that_counts(memory):
    store = CheckpointStore(Storage(memory))
    saved = store.save(manifest(10), WRITERS)
    with pytest.raises(OSError, match="No space left"):
        store.save(manifest(20), {**WRITERS, "optimizer.pt": on_a_full_disk(writing(b"x" * 1001))})
    assert store.latest(never) == saved
    assert store.storage.list_directories() == ["step_00000010.a1"]
    store.storage.child("step_00000020.a1").write_bytes("model.pt", b"half")  # left by a process that died
    rejected = {}
    assert store.latest(rejected.__setitem__) == saved
    assert rejected == {"step_00000020.a1": "it has no manifest"}
    store.quarantine("step_00000020.a1")  # it never was a complete checkpoint, so it is removed
    assert store.storage.list_directories() == ["step_00000010.a1"]
    assert store.storage.child(REJECTED).list_directories() == []


def test_deleting_keeps_what_it_is_told_and_leaves_unreadable_ones_alone(store):
    for step in (10, 20, 30, 40):
        store.save(manifest(step), WRITERS)
    delete_manifest(store.storage.local_path / "step_00000010.a1")
    store.delete_all_but({"step_00000040.a1", "step_00000020.a1"})
    assert store.storage.list_directories() == ["step_00000010.a1", "step_00000020.a1", "step_00000040.a1"]


def test_asking_for_a_checkpoint_that_is_not_there_names_those_that_are(store):
    store.save(manifest(10), WRITERS)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step_5'.*Available: step_00000010\.a1"):
        store.by_name("step_5")


def test_a_store_that_does_not_answer_is_not_taken_for_one_without_the_checkpoint(store, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no route to host")

    saved = store.save(manifest(10), WRITERS)
    monkeypatch.setattr(Storage, "read_bytes", refuse)
    with pytest.raises(ConnectionError, match="no route to host"):
        store.by_name(saved.name)


@pytest.mark.parametrize(
    ("num_to_keep", "steps", "expected"),
    [
        (2, {}, {30, 40}),
        (2, {10}, {10, 30, 40}),
        (2, {40}, {30, 40}),
        (2, {10, 20}, {10, 20, 30, 40}),
        (None, {10}, {10, 20, 30, 40}),
        (2, {11}, {20, 30, 40}),  # there is no checkpoint of step 11; the next one, of step 20, is the nearest
        (2, {41}, {30, 40}),
    ],
)
def test_the_newest_and_those_of_given_steps_are_kept(num_to_keep, steps, expected):
    manifests = [manifest(step) for step in (20, 40, 10, 30)]
    kept = kept_names(manifests, num_to_keep, steps)
    assert kept == {manifest(step).name for step in expected}


def test_of_saves_with_one_value_the_best_is_the_first_since_it_was_evaluated(store):
    for step, value in ((10, 0.5), (20, 0.9), (27, 0.9), (30, 0.7), (38, 0.7)):
        store.save(manifest(step, metrics={"val_accuracy": value}), WRITERS)
    assert choose(store, "best", Config()).step == 20
    assert choose(store, "latest", Config()).step == 38


def test_of_checkpoints_evaluated_besides_training_the_best_is_known_from_the_logged_points(store, tmp_path):
    for step in (10, 20, 30):  # each has the metrics of the previous evaluation
        store.save(manifest(step, metrics={"val_accuracy": {10: 0.0, 20: 0.5, 30: 0.9}[step]}), WRITERS)
    lines = [{"split": "val", "step": step, "val_accuracy": value} for step, value in ((10, 0.5), (20, 0.9), (30, 0.7))]
    lines.append({"split": "train", "step": 30, "train_loss": 0.1})
    store.storage.parent.write_bytes("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    for where in ("inline", "beside"):  # e.g. of the invocation that resumes it
        config = Config()
        config.train.eval = where
        assert choose(store, "best", config).step == 20


def test_an_evaluation_on_a_gpu_that_is_not_there_is_refused(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda, but torch finds no GPU here: set device=auto or cpu"):
        evaluate(EvaluateConfig(run=store.storage.uri, device="cuda"))


def test_of_two_saves_of_one_step_the_later_attempt_counts(store):
    store.save(manifest(10, attempt=1, world_size=1), WRITERS)
    store.save(manifest(10, attempt=2, world_size=3), WRITERS)
    assert store.latest(never).world_size == 3


def test_a_manifest_of_another_format_is_rejected(store):
    saved = store.save(manifest(10), WRITERS)
    path = store.storage.local_path / saved.name / MANIFEST
    content = {"format": 99, **dataclasses.asdict(saved)}
    path.write_text(json.dumps({**content, "sha256": _sha256_of(content)}))
    for ask in (lambda: store.latest(never), lambda: store.manifests(never), lambda: store.by_name(saved.name)):
        with pytest.raises(CheckpointError, match=rf"{saved.name} is in format 99, and this ftexp reads formats 2 and"):
            ask()
    assert store.storage.list_directories() == [saved.name]


def as_format_2(store, saved):
    """Rewrite a manifest in format 2, which ftexp wrote before it used BLAKE3."""
    files = {name: {"bytes": len(each), "sha256": hashlib.sha256(each).hexdigest()} for name, each in CONTENT.items()}
    known = {name: value for name, value in dataclasses.asdict(saved).items() if name in FIELDS_OF_FORMAT_2}
    content = {"format": 2, **known, "files": files}
    path = store.storage.local_path / saved.name / MANIFEST
    path.write_text(json.dumps({**content, "sha256": _sha256_of(content)}))


FIELDS_OF_FORMAT_2 = {
    *("name", "step", "epoch", "position", "attempt", "world_size", "metrics", "state_versions", "written_by"),
    *("written_at", "versions", "fingerprint"),
}


def test_a_checkpoint_of_format_2_is_read_verified_and_rejected_by_its_sha_256(store):
    older = store.save(manifest(10), WRITERS)
    as_format_2(store, older)
    newer = store.save(manifest(20), WRITERS)
    found = store.by_name(older.name)
    assert content_hash(found, "model.pt") == hashlib.sha256(CONTENT["model.pt"]).hexdigest()
    assert content_hash(newer, "model.pt") == blake3(CONTENT["model.pt"]).hexdigest()
    assert (store.read(found), found.num_bytes) == (CONTENT, newer.num_bytes)
    assert dataclasses.replace(found, files=older.files) == older
    chaos.damage(store.storage.child(newer.name), "flip_byte")
    assert store.latest(lambda *_: None) == found
    chaos.damage(store.storage.child(older.name), "flip_byte")
    for check in (store.verify, store.read):
        with pytest.raises(CheckpointError, match=r"optimizer\.pt differs from its SHA-256"):
            check(found)


def test_a_flipped_bit_anywhere_in_a_manifest_never_stops_the_one_before_from_being_found(store):
    older, newer = (store.save(manifest(step), WRITERS) for step in (10, 20))
    directory = store.storage.child(newer.name)
    whole = directory.read_bytes(MANIFEST)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        directory.write_bytes(MANIFEST, bytes(flipped))
        assert store.latest(lambda *_: None) in (older, newer), whole[max(0, place - 30) : place + 10]


def test_a_quarantined_checkpoint_is_kept_and_no_longer_seen(store):
    for step in (10, 20):
        store.save(manifest(step), WRITERS)
    name = "step_00000020.a1"
    chaos.damage(store.storage.child(name), "truncate_checkpoint")
    before = files_under(store.storage.child(name).local_path)
    store.quarantine(name)
    assert [m.step for m in store.manifests(never)] == [10]
    assert store.storage.list_directories() == ["step_00000010.a1"]
    assert store.storage.child(REJECTED).list_directories() == [f"{name}.0"]
    assert files_under(store.storage.child(REJECTED, f"{name}.0").local_path) == before


def test_a_second_one_of_the_same_name_is_kept_beside_the_first(store):
    name = "step_00000020.a1"
    for number in range(3):
        store.save(manifest(20), {**WRITERS, "model.pt": writing(b"%d" % number)})
        store.save(manifest(20, attempt=10), WRITERS)  # its name begins with the other's
        store.quarantine(f"{name}0")
        store.quarantine(name)
    rejected = store.storage.child(REJECTED)
    assert rejected.list_directories() == sorted(f"{one}.{number}" for one in (name, f"{name}0") for number in range(3))
    assert [rejected.child(f"{name}.{number}").read_bytes("model.pt") for number in range(3)] == [b"0", b"1", b"2"]
    assert store.storage.list_directories() == []


def test_quarantine_finds_a_free_number_where_its_owner_removed_one(store):
    name = "step_00000020.a1"
    for _ in range(2):
        store.save(manifest(20), WRITERS)
        store.quarantine(name)
    store.storage.child(REJECTED, f"{name}.0").delete()
    store.save(manifest(20), WRITERS)
    store.quarantine(name)
    assert len(store.storage.child(REJECTED).list_directories()) == 2


def test_an_object_stores_damaged_checkpoint_is_moved_with_all_its_files(memory):
    store = CheckpointStore(Storage(memory))
    saved = store.save(manifest(20), WRITERS)
    chaos.damage(store.storage.child(saved.name), "flip_byte")
    store.quarantine(saved.name)
    assert store.storage.list_directories() == []
    assert store.storage.child(REJECTED, f"{saved.name}.0").list_files() == sorted([*FILES, MANIFEST])


def test_a_checkpoint_is_located_by_its_own_folder_or_by_its_run(tmp_path):
    store = CheckpointStore(Storage.at(str(tmp_path), "run", CHECKPOINTS))
    older, newer = (store.save(manifest(step), WRITERS) for step in (10, 20))
    for uri, expected in (
        (tmp_path / "run", newer),
        (tmp_path / "run" / CHECKPOINTS / older.name, older),
        (f"{tmp_path}/run/{CHECKPOINTS}/{older.name}/", older),
        (f"file://{tmp_path}/run", newer),
    ):
        where, found = locate(str(uri))
        assert (where.storage, found) == (store.storage, expected)
        assert where.read(found) == CONTENT
    chaos.damage(store.storage.child(newer.name), "truncate_checkpoint")
    assert locate(str(tmp_path / "run"))[1] == older  # the latest that passes verification


def test_locating_nothing_tells_where_and_what_is_damaged(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/run holds no checkpoint that verifies: set a run"):
        locate(str(tmp_path / "run"))
    store = CheckpointStore(Storage.at(str(tmp_path), "run", CHECKPOINTS))
    store.save(manifest(10), WRITERS)
    chaos.damage(store.storage.child("step_00000010.a1"), "delete_manifest")
    with pytest.raises(CheckpointError, match=r"verifies \(step_00000010\.a1: it has no manifest\): set a run"):
        locate(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="holds no checkpoint that verifies"):
        locate(str(tmp_path / "run" / CHECKPOINTS / "step_00000010.a1"))


def test_a_checkpoint_is_located_on_an_object_store(memory):
    store = CheckpointStore(Storage(memory).child(CHECKPOINTS))
    saved = store.save(manifest(10), WRITERS)
    assert locate(memory)[1] == locate(f"{memory}/{CHECKPOINTS}/{saved.name}")[1] == saved


class Payload:
    """An object that runs code when it is unpickled, as in a hostile checkpoint."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (exec, (f"import pathlib; pathlib.Path(r'{self.trace}').touch()",))


def zipped(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("pack", [pickle.dumps, zipped], ids=["pickle", "torch.save"])
def test_code_in_a_checkpoint_with_a_valid_manifest_is_refused_and_does_not_run(store, tmp_path, pack):
    trace = tmp_path / "ran"
    saved = store.save(manifest(10), {**WRITERS, "model.pt": writing(pack({"weights": Payload(trace)}))})
    assert store.latest(never) == saved  # the hashes are right: they don't prove who wrote it
    with pytest.raises(CheckpointError, match=r"model\.pt can't be loaded as plain data"):
        load_part("model.pt", store.read(saved)["model.pt"])
    assert not trace.exists()
