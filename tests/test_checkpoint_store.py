"""The store: a checkpoint counts when it is whole, and the newest whole one is found whatever happened."""

import dataclasses
import json
import shutil

import pytest

from ftexp.checkpoint.store import FILES, MANIFEST, CheckpointStore, Manifest, kept_names
from ftexp.errors import CheckpointError
from ftexp.storage import Storage

CONTENT = {name: name.encode() * 50 for name in FILES}


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
        "versions": {},
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(Storage.at(str(tmp_path / "checkpoints")))


def never(name, reason):
    raise AssertionError(f"{name} was rejected: {reason}")


def test_what_was_saved_comes_back(store):
    saved = store.save(manifest(10), CONTENT)
    found, files = store.latest(never)
    assert found == saved
    assert files == CONTENT
    assert saved.files["model.pt"]["bytes"] == len(CONTENT["model.pt"])


def test_latest_is_the_highest_step_not_the_last_written_nor_the_last_name(store):
    for step, attempt in ((20, 1), (30, 2), (10, 3)):
        store.save(manifest(step, attempt), CONTENT)
    assert store.latest(never)[0].step == 30
    assert [m.step for m in store.manifests(never)] == [30, 20, 10]


def test_an_empty_or_missing_folder_has_no_latest(store):
    assert store.latest(never) is None


def truncate(folder):
    (folder / "optimizer.pt").write_bytes(CONTENT["optimizer.pt"][:-1])


def flip_a_byte(folder):
    content = bytearray((folder / "model.pt").read_bytes())
    content[7] ^= 1
    (folder / "model.pt").write_bytes(bytes(content))


def delete_manifest(folder):
    (folder / MANIFEST).unlink()


def tear_manifest(folder):
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:40])


def delete_a_file(folder):
    (folder / "extra_state.pt").unlink()


def empty_the_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def rename_the_folder(folder):
    folder.rename(folder.with_name("step_00009999.a9"))


def forget_a_file_in_the_manifest(folder):
    content = json.loads((folder / MANIFEST).read_text())
    del content["files"]["optimizer.pt"]
    (folder / MANIFEST).write_text(json.dumps(content))


DAMAGE = [
    (truncate, "optimizer.pt has"),
    (flip_a_byte, "model.pt differs from its SHA-256"),
    (delete_manifest, "no readable manifest"),
    (tear_manifest, "no readable manifest"),
    (delete_a_file, "extra_state.pt can't be read"),
    (empty_the_folder, "no readable manifest"),
    (rename_the_folder, "no readable manifest"),
    (forget_a_file_in_the_manifest, "optimizer.pt isn't in the manifest"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
@pytest.mark.parametrize("num_damaged", [1, 2])
def test_damage_is_noticed_and_the_one_before_is_taken(store, damage, reason, num_damaged):
    for step in (10, 20, 30):
        store.save(manifest(step), CONTENT)
    if damage is rename_the_folder and num_damaged == 2:
        num_damaged = 1  # both would get the same name
    for step in (30, 20)[:num_damaged]:
        damage(store.storage.local_path / f"step_{step:08d}.a1")
    rejected = {}
    found, files = store.latest(rejected.__setitem__)
    assert (found.step, files) == (30 - 10 * num_damaged, CONTENT)
    assert len(rejected) == num_damaged
    assert all(reason in text for text in rejected.values())


def test_a_half_written_checkpoint_is_not_seen(store):
    store.save(manifest(10), CONTENT)
    half = store.storage.local_path / ".tmp-step_00000020.a1"
    half.mkdir()
    (half / "model.pt").write_bytes(b"half")
    assert store.latest(never)[0].step == 10
    store.save(manifest(20), CONTENT)  # the same name again, over what the dead process left
    assert store.latest(never)[0].step == 20
    assert not half.exists()


def test_a_save_that_reads_back_wrong_is_an_error_not_a_checkpoint_to_trust(store, monkeypatch):
    publish = Storage.publish

    def publish_and_lose_a_byte(self, files, last):
        publish(self, {**files, "model.pt": files["model.pt"][:-1]}, last)

    monkeypatch.setattr(Storage, "publish", publish_and_lose_a_byte)
    with pytest.raises(CheckpointError, match=r"model\.pt has"):
        store.save(manifest(10), CONTENT)


def test_deleting_keeps_what_it_is_told_and_leaves_unreadable_ones_alone(store):
    for step in (10, 20, 30, 40):
        store.save(manifest(step), CONTENT)
    delete_manifest(store.storage.local_path / "step_00000010.a1")
    store.delete_all_but({"step_00000040.a1", "step_00000020.a1"})
    assert store.storage.list_folders() == ["step_00000010.a1", "step_00000020.a1", "step_00000040.a1"]


def test_asking_for_a_checkpoint_that_is_not_there_names_those_that_are(store):
    store.save(manifest(10), CONTENT)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step_5'.*Available: step_00000010\.a1"):
        store.by_name("step_5")


@pytest.mark.parametrize(
    ("num_to_keep", "best_step", "expected"),
    [
        (2, None, {30, 40}),
        (2, 10, {10, 30, 40}),
        (2, 40, {30, 40}),
        (None, 10, {10, 20, 30, 40}),
        (2, 11, {30, 40}),
    ],
)
def test_the_newest_and_the_best_are_kept(num_to_keep, best_step, expected):
    manifests = [manifest(step) for step in (20, 40, 10, 30)]
    kept = kept_names(manifests, num_to_keep, best_step)
    assert kept == {manifest(step).name for step in expected}


def test_of_two_saves_of_one_step_the_later_attempt_counts(store):
    store.save(manifest(10, attempt=1, world_size=1), CONTENT)
    store.save(manifest(10, attempt=2, world_size=3), CONTENT)
    assert store.latest(never)[0].world_size == 3


def test_a_manifest_of_another_format_is_rejected(store):
    saved = store.save(manifest(10), CONTENT)
    path = store.storage.local_path / saved.name / MANIFEST
    path.write_text(json.dumps({"format": 99, **dataclasses.asdict(saved)}))
    rejected = {}
    assert store.latest(rejected.__setitem__) is None
    assert list(rejected) == [saved.name]
