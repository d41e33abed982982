"""Storage: files are complete or absent, on a local disk and on an object store."""

import threading
from types import SimpleNamespace

import pyarrow.fs
import pytest

from ftexp.errors import ConfigError, StorageError
from ftexp.storage.append_log import AppendLog
from ftexp.storage.directory import Storage, open_uri, write_all


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
    monkeypatch.setattr(
        "ftexp.storage.directory.os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes("run.json", b"new")
    assert storage.read_bytes("run.json") == b"old"


def test_a_published_folder_appears_whole_or_not_at_all(storage):
    seen = []

    def writer(name):
        def write(stream):
            assert not storage.child("step").exists(), "visible before it was complete"
            seen.append(name)
            stream.write(name.encode())
            if name == "bad":
                raise OSError("disk full")

        return write

    def publish(*names):
        storage.child("step").publish({name: writer(name) for name in names}, last="last")

    with pytest.raises(OSError, match="disk full"):
        publish("last", "good", "bad")
    assert seen == ["good", "bad"]
    assert list(storage.local_path.iterdir()) == []  # no partial files either, since a full disk needs the room
    publish("last", "good")
    assert storage.list_directories() == ["step"]
    assert seen[2:] == ["good", "last"]
    assert [storage.child("step").read_bytes(name) for name in ("good", "last")] == [b"good", b"last"]


def test_what_a_dead_process_left_of_a_folder_does_not_get_into_the_next(storage):
    storage.write_bytes(".tmp-step/stale", b"of another time")
    storage.child("step").publish({"last": lambda stream: stream.write(b"1")}, last="last")
    assert storage.child("step").list_files() == ["last"]
    assert [path.name for path in storage.local_path.iterdir()] == ["step"]


def test_a_writer_that_fails_in_another_way_leaves_nothing_either(storage):
    storage.write_bytes("other", b"")

    def broken(stream):
        stream.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(RuntimeError):
        storage.child("step").publish({"last": broken}, last="last")
    assert [path.name for path in storage.local_path.iterdir()] == ["other"]


def test_an_object_stores_folder_gets_the_deciding_file_last(memory):
    order = []

    def writer(name):
        return lambda stream: (order.append(name), stream.write(name.encode()))

    directory = Storage(memory).child("step")
    directory.publish({name: writer(name) for name in ("last", "a", "b")}, last="last")
    assert order == ["a", "b", "last"]
    assert directory.list_files() == ["a", "b", "last"]
    assert directory.read_bytes("b") == b"b"


@pytest.mark.parametrize("place", ["local", "object store"])
def test_files_and_folders_are_listed_apart_sorted_and_without_hidden_ones(storage, memory, place):
    storage = storage if place == "local" else Storage(memory)
    assert (storage.list_files(), storage.list_directories()) == ([], [])
    for name in ("b", "a", "folder/inside", ".hidden", ".tmp-torn", ".hidden-folder/inside"):
        storage.write_bytes(name, b"")
    assert storage.list_files() == ["a", "b"]
    assert storage.list_directories() == ["folder"]
    assert storage.child("folder").list_files() == ["inside"]


@pytest.mark.parametrize("place", ["local", "object store"])
def test_sweeping_removes_what_is_half_written_and_nothing_else(storage, memory, place):
    storage = storage if place == "local" else Storage(memory)
    assert storage.sweep() == []
    kept = ("run.json", "step/model.pt", ".rejected/step.0/model.pt", "tmp-notes", "step/.tmp-deeper")
    for name in (*kept, ".tmp-run.json", ".tmp-step/model.pt", ".tmp-step/sub/x"):
        storage.write_bytes(name, b"")
    assert storage.sweep() == [".tmp-run.json", ".tmp-step"]
    assert not storage.exists(".tmp-run.json")
    assert not storage.exists(".tmp-step")
    assert all(storage.exists(name) for name in kept)
    assert storage.sweep() == []


@pytest.mark.parametrize("place", ["local", "object store"])
def test_a_folder_moves_with_its_files_into_a_folder_that_is_made(storage, memory, place):
    storage = storage if place == "local" else Storage(memory)
    for name in ("model.pt", "manifest.json"):
        storage.child("step").write_bytes(name, name.encode())
    storage.child("step").move_to(storage.child(".rejected", "step.0"))
    assert not storage.child("step").exists()
    moved = storage.child(".rejected", "step.0")
    assert moved.list_files() == ["manifest.json", "model.pt"]
    assert moved.read_bytes("model.pt") == b"model.pt"


def test_a_folder_does_not_move_onto_another(storage):
    for directory in ("one", "two"):
        storage.write_bytes(f"{directory}/file", directory.encode())
    with pytest.raises(OSError):
        storage.child("one").move_to(storage.child("two"))
    assert [storage.read_bytes(f"{directory}/file") for directory in ("one", "two")] == [b"one", b"two"]
    with pytest.raises(OSError):
        storage.child("nothing").move_to(storage.child("three"))


@pytest.mark.parametrize(
    ("uri", "parent", "name"),
    [
        ("/runs/first/checkpoints", "/runs/first", "checkpoints"),
        ("/runs", "/", "runs"),
        ("/odd?name/x?y", "/odd?name", "x?y"),  # a question mark has no meaning in a local path
        ("s3://bucket/first/step", "s3://bucket/first", "step"),
        ("s3://bucket/first/step?region=eu-west-1&x=a/b", "s3://bucket/first?region=eu-west-1&x=a/b", "step"),
    ],
)
def test_a_folder_knows_its_name_and_what_holds_it(uri, parent, name):
    directory = Storage(uri)
    assert (directory.parent.uri, directory.name) == (parent, name)
    assert directory.parent.child(directory.name) == directory or parent == "/"


def test_a_stream_is_written_whole_though_the_file_takes_a_part_at_a_time():
    class Reluctant:
        content = b""

        def write(self, data):
            self.content += bytes(data[:3])
            return min(3, len(data))

    stream = Reluctant()
    write_all(stream, b"0123456789")
    write_all(stream, memoryview(b""))
    assert stream.content == b"0123456789"


def test_local_paths_become_absolute_and_uris_keep_their_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage.at("runs", "x").uri == str(tmp_path / "runs" / "x")
    assert Storage.at(f"file://{tmp_path}/my%20runs", "x").local_path == tmp_path / "my runs" / "x"
    assert Storage.at(f"{tmp_path}/my%20runs").local_path == tmp_path / "my%20runs"
    remote = Storage.at("s3://bucket/prefix?region=eu-west-1", "x").child("checkpoints")
    assert remote.uri == "s3://bucket/prefix/x/checkpoints?region=eu-west-1"
    assert remote.local_path is None


def test_an_unknown_scheme_is_an_error_that_names_the_key():
    with pytest.raises(ConfigError, match=r"^foo://x can't be opened"):
        Storage.at("foo://x").list_directories()
    with pytest.raises(ConfigError, match=r"^data\.root=foo://x can't be opened"):
        open_uri("foo://x", "data.root")


def test_a_store_that_does_not_answer_is_no_mistake_in_the_config(monkeypatch):
    def refuse(_):
        raise OSError("When resolving region for bucket 'b': no route to host")

    monkeypatch.setattr(pyarrow.fs, "FileSystem", SimpleNamespace(from_uri=refuse))
    with pytest.raises(OSError, match="no route to host"):  # so that a worker's start is retried
        Storage.at("s3://b/run").list_directories()
    with pytest.raises(ConfigError, match=r"^run\.storage=s3://b/run can't be opened: .*no route to host"):
        open_uri("s3://b/run", "run.storage")  # the check before the start


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


def test_an_object_store_gets_a_log_again_only_with_new_lines(storage, monkeypatch):
    storage.local_path.mkdir()
    monkeypatch.setattr(Storage, "local_path", None)
    written, write = [], Storage.write_bytes
    monkeypatch.setattr(Storage, "write_bytes", lambda *arguments: (written.append(arguments[2]), write(*arguments)))
    log = AppendLog(storage, "log.jsonl")
    log.flush()
    log.flush()
    log.append("1")
    log.sync()
    log.close()
    log = AppendLog(storage, "log.jsonl")
    log.sync()
    log.append("2")
    log.close()
    assert written == [b"", b"1\n", b"1\n2\n"]


def test_lines_that_another_thread_reads_while_they_are_written_are_there_once(tmp_path):
    log, found = AppendLog(Storage.at(str(tmp_path)), "log"), []
    reader = threading.Thread(target=lambda: found.extend(log.lines()))

    class Watched:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            written = self.file.write(content)
            reader.start()
            reader.join(0.2)  # without a lock it would end here, with the line from the file and from memory
            return written

    log._file = Watched(log._file)
    log.append("a")
    reader.join()
    assert found == ["a"]
