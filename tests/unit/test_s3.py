"""An object store that speaks S3: what lies there is as safe as on a disk, also while it doesn't answer."""

import contextlib
import json
import os
import re
import signal
import socket
import threading

import pytest

from ftexp.checkpoint.store import CHECKPOINTS, FILES, MANIFEST, REJECTED, CheckpointStore, Manifest, locate
from ftexp.drilling.report import compare
from ftexp.errors import CheckpointError, RunInUseError
from ftexp.storage.append_log import AppendLog
from ftexp.storage.directory import Storage
from ftexp.storage.lease import LEASE_FILE, Lease
from tests.support.command import Command
from tests.support.s3 import s3_uri

CONTENT = {name: name.encode() * 50 for name in FILES}
WRITERS = {name: lambda stream, content=content: stream.write(content) for name, content in CONTENT.items()}


@pytest.fixture
def s3(s3_server, request):
    """A folder of the test's own."""
    return Storage.at(s3_uri(s3_server, "bucket"), request.node.name)


def manifest(step):
    return Manifest(
        name=f"step_{step:08d}.a1", step=step, epoch=0, position=step * 32, attempt=1, world_size=2, metrics={},
        state_versions={"progress": 1}, written_by="run 'x'", written_at=1.5, versions={}, fingerprint={"seed": 0},
    )  # fmt: skip


def everything(storage):
    """Paths of all objects under a folder."""
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
    # two saves that were cut short, and one whose bytes changed afterwards
    for torn in ("step_00000004.a1", "step_00000005.a1"):
        store.storage.child(torn).write_bytes("model.pt", b"half of it")
    store.storage.child("step_00000003.a1").write_bytes("optimizer.pt", CONTENT["optimizer.pt"][:-1] + b"?")
    rejected = {}
    assert store.latest(rejected.__setitem__).step == 2
    assert rejected == {
        "step_00000005.a1": "it has no manifest",
        "step_00000004.a1": "it has no manifest",
        "step_00000003.a1": "optimizer.pt differs from its SHA-256",
    }
    for name in rejected:
        store.quarantine(name)
    moved = [f"{REJECTED}/step_00000003.a1.0/{name}" for name in sorted([*FILES, MANIFEST])]
    assert everything(store.storage) == moved + whole[:8]
    assert store.storage.list_folders() == ["step_00000001.a1", "step_00000002.a1"]
    assert store.latest(lambda *_: pytest.fail("nothing is left to reject")).step == 2
    assert store.read(store.by_name("step_00000002.a1")) == CONTENT
    store.delete_all_but(["step_00000002.a1"])
    assert everything(store.storage) == moved + whole[4:8]
    assert locate(s3.uri)[1].step == 2

    # what is removed is gone, and asking for it says so
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

    # an owner that died left its claim; once it was taken over, what wasn't dead after all knows
    dead = Lease.take(s3, beat_s=3600, watch_s=0.3)
    second = Lease.take(s3, said.append, beat_s=0.05, watch_s=0.3)
    assert json.loads(s3.read_bytes(LEASE_FILE))["token"] == second._token
    dead.release()
    second.release()


class Proxy:
    """A TCP port in front of an S3 server, whose service ends in the middle of a request, until `end` is called.

    The request in which `trigger` is found is cut off, with all others under way. Later ones are told 403, which
    pyarrow doesn't try again: whatever else an outage says takes it 6 s for each operation.
    """

    REFUSED = (
        b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        b"Content-Length: 40\r\n\r\n<Error><Code>AccessDenied</Code></Error>"
    )

    def __init__(self, port, trigger):
        self._port, self._trigger = port, trigger
        self._down, self._open = threading.Event(), []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def end(self):
        self._trigger = None
        self._down.clear()

    def close(self):
        self._listener.close()
        self._cut()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError):
            if self._down.is_set():
                client.recv(1 << 16)
                client.sendall(self.REFUSED)
                client.close()
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._open += [client, server]
            threading.Thread(target=self._pass_on, args=[server, client], daemon=True).start()
            self._pass_on(client, server)

    def _pass_on(self, source, target):
        end_of_last = b""  # a request may arrive in pieces
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                if self._trigger is not None and self._trigger.search(end_of_last + content):
                    self._down.set()
                end_of_last = content[-200:]
                if self._down.is_set():
                    break
                target.sendall(content)
        if self._down.is_set():
            self._cut()
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self):
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def slowed_down(pid):
    """Have a process run a third of the time."""
    over = threading.Event()

    def hold():
        while not over.wait(0.1):
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.2)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def is_whole(store, after):
    """Whether there is a checkpoint of a later step."""
    names = store.storage.list_folders()
    return any(name > f"step_{after + 1:08d}" and store.storage.exists(f"{name}/{MANIFEST}") for name in names)


@pytest.mark.timeout(600)
def test_an_outage_of_s3_in_the_middle_of_a_save_changes_nothing(ftexp, s3_server, tmp_path, s3):
    options = [
        "train.epochs=10", "train.max_steps=200", "train.log_every_steps=1", "checkpoint.every_epochs=null",
        "checkpoint.every_steps=25",
    ]  # fmt: skip
    clean = ftexp(*options, "run.name=run")
    assert clean.wait() == 0, clean.output

    # as the second save is about to write its second file, the store is gone until two saves have failed. A worker is
    # slowed down meanwhile: saves give way to training, and on a busy machine they'd come after the last step
    proxy = Proxy(s3_server, re.compile(rb"checkpoints/step_(?!00000025)\d+\.a1/optimizer\.pt"))
    through = Storage.at(s3_uri(proxy.port, "bucket"), s3.name)
    command = Command("train", [*options, f"run.storage='{through.uri}'", "run.name=run"], tmp_path)
    run = s3.child("run")
    store = CheckpointStore(run.child(CHECKPOINTS))
    try:
        command.wait_until(lambda: " pids " in command.output)
        pid = int(re.search(r"pids \d+, (\d+)", command.output)[1])
        with slowed_down(pid):
            command.wait_until(lambda: command.output.count(" not written") >= 2)
            failed_last = re.findall(r"step (\d+) not written", command.output)[-1]
            proxy.end()
            command.wait_until(lambda: is_whole(store, after=int(failed_last)))
        os.kill(pid, signal.SIGKILL)
        assert command.wait() == 0, command.output
    finally:
        command.process.kill()
        proxy.close()
    report = compare(Storage.at(str(tmp_path / "runs"), "run"), run, 32, 0)
    assert report.differences == []
    events = [json.loads(line) for line in run.read_bytes("events.jsonl").decode().splitlines()]
    failed = [event["step"] for event in events if event["event"] == "checkpoint_failed"]
    saved = [event["checkpoint"] for event in events if event["event"] == "checkpoint_saved"]
    kept = store.storage.list_folders()
    # training went on meanwhile, and saves did afterwards
    assert failed[0] >= 50
    assert len(failed) == len(set(failed)) >= 2
    # the killed worker's run went back to the save after them, and what the outage had torn was removed
    (restored,) = [event for event in events if event["event"] == "restored"]
    assert restored["checkpoint"] > f"step_{failed[-1]:08d}"
    assert restored["checkpoint"].endswith(".a1")
    rejected = {event["checkpoint"]: event["reason"] for event in events if event["event"] == "checkpoint_rejected"}
    torn = f"step_{failed[0]:08d}.a1"
    assert rejected[torn] == "it has no manifest"
    assert set(rejected.values()) == {"it has no manifest"}
    assert torn not in kept
    record = json.loads(run.read_bytes("run.json"))
    assert record["status"] == "finished"
    assert [failure["cause"] for failure in record["failures"]] == ["crash"]
    assert record["checkpoint"] == saved[-1] == "step_00000200.a2"
    assert kept[-1] == saved[-1]
    for name in kept:  # also one that was complete when the kill came, and was not told any more
        store.verify(store.by_name(name))
