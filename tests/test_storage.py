"""Storage: whole files or none, on a local disk and on an object store alike."""

import pytest

from ftexp.errors import ConfigError, StorageError
from ftexp.storage import AppendLog, Storage, open_uri


@pytest.fixture
def storage(tmp_path):
    return Storage.at(str(tmp_path / "run"))


def test_what_is_written_is_read(storage):
    storage.write_bytes("a/b.bin", b"content")
    assert storage.read_bytes("a/b.bin") == b"content"
    assert storage.exists("a/b.bin")
    assert not storage.exists("a/c.bin")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/c.bin")


def test_a_write_that_fails_leaves_the_old_content(storage, monkeypatch):
    storage.write_bytes("run.json", b"old")
    monkeypatch.setattr("ftexp.storage.os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes("run.json", b"new")
    assert storage.read_bytes("run.json") == b"old"


def test_a_published_folder_appears_whole_or_not_at_all(storage, monkeypatch):
    real, seen = Storage.write_bytes, []

    def write(self, name, content):
        assert not storage.child("step").exists(), "visible before it was complete"
        seen.append(name)
        if name == "bad":
            raise OSError("disk full")
        real(self, name, content)

    monkeypatch.setattr(Storage, "write_bytes", write)
    with pytest.raises(OSError, match="disk full"):
        storage.child("step").publish({"last": b"1", "good": b"2", "bad": b"3"}, last="last")
    assert seen == ["good", "bad"]
    assert storage.list_folders() == []
    storage.child("step").publish({"last": b"1", "good": b"2"}, last="last")
    assert storage.list_folders() == ["step"]
    assert seen[-1] == "last"


def test_local_paths_become_absolute_and_uris_keep_their_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage.at("runs", "x").uri == str(tmp_path / "runs" / "x")
    assert Storage.at(f"file://{tmp_path}/my%20runs", "x").local_path == tmp_path / "my runs" / "x"
    assert Storage.at(f"{tmp_path}/my%20runs").local_path == tmp_path / "my%20runs"
    remote = Storage.at("s3://bucket/prefix?region=eu-west-1", "x").child("checkpoints")
    assert remote.uri == "s3://bucket/prefix/x/checkpoints?region=eu-west-1"
    assert remote.local_path is None


def test_an_unknown_scheme_is_an_error_that_names_the_key():
    with pytest.raises(ConfigError, match=r"run\.storage=foo://x"):
        Storage.at("foo://x").list_folders()
    with pytest.raises(ConfigError, match=r"data\.root=foo://x"):
        open_uri("foo://x", "data.root")


def test_a_place_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"run\.storage: .*file/run can't be written"):
        Storage.at(str(tmp_path / "file"), "run").require_writable()


def test_a_writable_place_is_left_clean(storage):
    storage.require_writable()
    assert list(storage.local_path.iterdir()) == []


def test_a_torn_last_line_is_cut_before_more_is_added(storage):
    storage.write_bytes("log.jsonl", b'{"a": 1}\n{"b": ')
    log = AppendLog(storage, "log.jsonl")
    log.append('{"c": 3}')
    log.close()
    assert storage.read_bytes("log.jsonl") == b'{"a": 1}\n{"c": 3}\n'


def test_deleting_what_is_not_there_is_no_error(storage):
    storage.delete()
    storage.delete_file("x")
    storage.write_bytes("x", b"")
    storage.delete_file("x")
    assert not storage.exists("x")


def test_a_line_that_was_cut_by_a_full_disk_is_written_whole_later(storage):
    log = AppendLog(storage, "log.jsonl")
    log.append("first")

    class HalfFull:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            return self.file.write(content[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    real, log._file = log._file, HalfFull(log._file)
    log.append("second")
    assert storage.read_bytes("log.jsonl") == b"first\n"
    log._file = real
    log.append("third")
    log.close()
    assert storage.read_bytes("log.jsonl") == b"first\nsecond\nthird\n"
