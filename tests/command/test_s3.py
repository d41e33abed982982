"""A run whose S3 store is unavailable for a while."""

import contextlib
import json
import os
import re
import signal
import socket
import threading

import pytest

from ftexp.checkpoint.manifest import MANIFEST
from ftexp.checkpoint.store import CheckpointStore
from ftexp.drill.report import compare
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage
from tests.support.command import Command
from tests.support.reference import BATCH, EVERY_FEW_STEPS, OPTIONS, PLUGIN, SAVE_EVERY, STEPS
from tests.support.s3 import s3_uri


class Proxy:
    """A TCP proxy of an S3 server, with an outage that starts in the middle of a request and lasts until `end`.

    The request that matches `trigger` is cut off, with all others in flight. Later ones get a 403, which pyarrow
    doesn't retry; any other response to an outage costs it 6 s per operation.
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
        self._listener.shutdown(socket.SHUT_RDWR)  # otherwise accept() would keep waiting
        self._listener.close()
        self._cut()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), client:
            if self._down.is_set():
                client.recv(1 << 16)
                client.sendall(self.REFUSED)
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                self._open += [client, server]
                back = threading.Thread(target=self._pass_on, args=[server, client], daemon=True)
                back.start()
                self._pass_on(client, server)
                back.join()

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


def is_whole(store, after):
    """Return whether there is a complete checkpoint of a step later than `after`."""
    names = store.storage.list_directories()
    return any(name > f"step_{after + 1:08d}" and store.storage.exists(f"{name}/{MANIFEST}") for name in names)


@pytest.mark.timeout(600)
def test_an_outage_of_s3_in_the_middle_of_a_save_changes_nothing(
    clean_run, pictures, preloaded, s3_server, tmp_path, s3
):
    # The outage starts when the second checkpoint writes its second file, and lasts until two checkpoints have failed.
    # Steps are slowed down meanwhile: saving yields to training, and on a busy machine it would end after the last step
    (tmp_path / "obedient.py").write_text(PLUGIN)
    (tmp_path / "slow").touch()
    proxy = Proxy(s3_server, re.compile(rb"checkpoints/step_(?!%08d)\d+\.a1/optimizer\.pt" % SAVE_EVERY))
    through = Storage.at(s3_uri(proxy.port, "bucket"), s3.name)
    words = [*OPTIONS, *EVERY_FEW_STEPS, *pictures, f"run.storage='{through.uri}'", "run.name=run"]
    words += ["scaling.num_workers=2", "report.enabled=false"]
    command = Command("train", words, tmp_path, preloaded, joins=True)
    run = s3.child("run")
    store = CheckpointStore(run.child(CHECKPOINTS))
    try:
        command.wait_until(lambda: command.output.count(" not written") >= 2)
        failed_last = re.findall(r"step (\d+) not written", command.output)[-1]
        proxy.end()
        command.wait_until(lambda: is_whole(store, after=int(failed_last)))
        (tmp_path / "slow").unlink()
        os.kill(int(re.search(r"pids \d+, (\d+)", command.output)[1]), signal.SIGKILL)
        assert command.wait() == 0, command.output
    finally:
        command.process.kill()
        proxy.close()
    report = compare(clean_run.storage, run, BATCH, 0)
    assert report.differences == []
    events = [json.loads(line) for line in run.read_bytes("events.jsonl").decode().splitlines()]
    failed = [event["step"] for event in events if event["event"] == "checkpoint_failed"]
    saved = [event["checkpoint"] for event in events if event["event"] == "checkpoint_saved"]
    kept = store.storage.list_directories()
    # training continued during the outage, and saving after it
    assert failed[0] >= 2 * SAVE_EVERY
    assert len(failed) == len(set(failed)) >= 2
    # after the kill, the run resumed from a checkpoint after the outage; the incomplete ones were removed
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
    assert record["checkpoint"] == saved[-1] == f"step_{STEPS:08d}.a2"
    assert kept[-1] == saved[-1]
    for name in kept:  # also one that was complete at the kill but not reported any more
        store.verify(store.by_name(name))
