"""The line between workers and driver."""

import json
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest

from ftexp.errors import FtexpError
from ftexp.wire.hub import SAVE, STOP, Hub, HubAddress, Line


@pytest.fixture
def messages():
    return queue.Queue()


@pytest.fixture
def hub(messages):
    def handle(message):
        messages.put(message)
        return {"attempt": 7} if message["kind"] == "hello" else None

    hub = Hub("127.0.0.1", handle)
    yield hub
    hub.close()


def next_message(messages):
    return messages.get(timeout=20)


def test_messages_arrive_in_order_and_a_hello_is_answered(hub, messages):
    line = Line(hub.address, {"kind": "hello", "rank": 0})
    assert line.answer == {"attempt": 7}
    for step in range(100):
        line.send("tick", step=step)
    line.close()
    assert next_message(messages)["kind"] == "hello"
    assert [next_message(messages)["step"] for _ in range(100)] == list(range(100))
    assert next_message(messages)["kind"] == "goodbye"


def test_once_the_handler_has_raised_everybody_is_told_to_stop_and_nobody_waits():
    handled = []

    def handle(message):
        handled.append(message["kind"])
        if message["kind"] == "metrics":
            raise UnicodeEncodeError("latin-1", "⚡", 0, 1, "ordinal not in range(256)")
        return {"attempt": 1}

    hub = Hub("127.0.0.1", handle)
    first = Line(hub.address, {"kind": "hello", "rank": 0})
    first.send("metrics")
    first.flush()
    first.close()  # returns when all was taken in
    assert isinstance(hub.failed, UnicodeEncodeError)
    told = Line(hub.address, {"kind": "failure"}).answer
    assert told.keys() == {"stop"}
    assert told["stop"].startswith("the driver failed: UnicodeEncodeError: 'latin-1' codec can't encode")
    assert handled == ["hello", "metrics"], "a handler that failed half-way isn't called again"
    hub.close()


def test_who_says_goodbye_stays_until_the_driver_has_handled_it_all():
    handled, held = [], threading.Event()

    def handle(message):
        assert message["kind"] == "hello" or held.wait(20)
        handled.append(message["kind"])

    hub = Hub("127.0.0.1", handle)
    line = Line(hub.address, {"kind": "hello", "rank": 0})
    line.send("metrics")
    closing = threading.Thread(target=line.close)
    closing.start()
    closing.join(0.5)
    assert closing.is_alive()
    held.set()
    closing.join(20)
    hub.close()  # as when fit() returns, since the workers have ended
    assert handled == ["hello", "metrics", "goodbye"]


def test_a_killed_process_is_told_at_once_and_what_it_flushed_is_not_lost(hub, messages):
    code = (
        "import os, signal, sys; from ftexp.wire.hub import *\n"
        "line = Line(HubAddress('127.0.0.1', int(sys.argv[1]), sys.argv[2]), {'kind': 'hello', 'rank': 1})\n"
        "line.send('tick', step=1); line.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(hub.address.port), hub.address.token], check=False)
    assert child.returncode == -signal.SIGKILL
    assert [next_message(messages)["kind"] for _ in range(3)] == ["hello", "tick", "lost"]


def test_who_is_killed_before_its_hello_is_answered_is_told_as_lost():
    held, messages = threading.Event(), queue.Queue()

    def handle(message):
        messages.put(message)
        assert held.wait(20)
        return {"attempt": 7}

    hub = Hub("127.0.0.1", handle)
    hub.tell(STOP)  # which a new line is told once its hello is answered
    with socket.create_connection((hub.address.host, hub.address.port)) as raw:
        raw.sendall(json.dumps({"kind": "hello", "rank": 1, "token": hub.address.token}).encode() + b"\n")
        assert next_message(messages)["kind"] == "hello"
        # closing resets it, as a kill does
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    held.set()
    assert next_message(messages)["kind"] == "lost"
    assert hub.tell(SAVE) == 0
    hub.close()


def test_a_goodbye_is_not_a_loss(hub, messages):
    Line(hub.address, {"kind": "hello", "rank": 0}).close()
    Line(hub.address, {"kind": "hello", "rank": 1}).close()
    kinds = sorted(next_message(messages)["kind"] for _ in range(4))
    assert kinds == ["goodbye", "goodbye", "hello", "hello"]


def test_a_caller_without_the_token_is_not_heard(hub, messages):
    wrong = HubAddress(hub.address.host, hub.address.port, "guess")
    line = Line(wrong, {"kind": "hello", "rank": 0})
    assert line.answer == {}
    Line(hub.address, {"kind": "hello", "rank": 5}).close()
    assert next_message(messages)["rank"] == 5


def test_garbage_does_not_stop_the_hub(hub, messages):
    with socket.create_connection((hub.address.host, hub.address.port)) as raw:
        raw.sendall(b"\xff\x00 not json\n")
    Line(hub.address, {"kind": "hello", "rank": 3}).close()
    assert next_message(messages)["rank"] == 3


def test_nothing_is_handled_after_close(hub, messages):
    line = Line(hub.address, {"kind": "hello", "rank": 0})
    assert next_message(messages)["kind"] == "hello"
    assert hub.take({"kind": "event"})
    assert next_message(messages) == {"kind": "event"}
    hub.close()
    line.send("tick", step=1)
    line.close()
    assert not hub.take({"kind": "event"})
    assert messages.empty()


def test_a_driver_that_can_not_be_reached_is_an_error_that_says_where():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(FtexpError, match=f"can't reach the driver at 127.0.0.1:{port}"):
        Line(HubAddress("127.0.0.1", port, "t"), {"kind": "hello", "rank": 0})


def test_a_worker_goes_on_when_the_driver_is_gone():
    hub = Hub("127.0.0.1", lambda message: {})
    line = Line(hub.address, {"kind": "hello", "rank": 0})
    line._socket.shutdown(socket.SHUT_RDWR)
    for _ in range(10):
        line.send("tick", step=1)
    line.flush()  # would wait for ever if the sending thread had died of the error
    hub.close()


def answer_syncs(message):
    return {"synced": message["number"], "problem": None} if message["kind"] == "sync" else {}


@pytest.mark.parametrize("word", [STOP, SAVE])
def test_every_open_line_is_told_to_stop_or_save_and_still_hears_whether_its_messages_are_safe(word):
    hub = Hub("127.0.0.1", answer_syncs)
    assert hub.tell(SAVE) == 0
    lines = [Line(hub.address, {"kind": "hello", "rank": rank}) for rank in range(2)]
    for line in lines:
        line.sync()
        assert (line.stop_requested, line.save_requested) == (False, False)
    assert hub.tell(word) == 2
    for line in lines:
        line.sync()  # answered after what was told, on the same line
        assert (line.stop_requested, line.save_requested) == (word == STOP, word == SAVE)
    for line in lines:
        line.close()
    hub.close()


def test_a_line_that_opens_after_the_run_was_told_to_stop_is_told_too():
    hub = Hub("127.0.0.1", answer_syncs)
    hub.tell(SAVE)
    before = Line(hub.address, {"kind": "hello", "rank": 0})
    before.sync()
    assert (before.stop_requested, before.save_requested) == (False, False)
    hub.tell(STOP)
    after = Line(hub.address, {"kind": "hello", "rank": 1})
    after.sync()
    assert after.stop_requested
    for line in (before, after):
        line.close()
    hub.close()


def test_a_line_that_said_goodbye_is_not_asked_to_stop(hub, messages):
    Line(hub.address, {"kind": "hello", "rank": 0}).close()
    assert [next_message(messages)["kind"] for _ in range(2)] == ["hello", "goodbye"]
    for thread in threading.enumerate():
        if "_serve" in thread.name:
            thread.join(timeout=5)
    assert hub.tell(STOP) == 0


def test_what_comes_while_a_sync_is_handled_is_not_lost(messages):
    def handle(message):
        messages.put(message)
        return answer_syncs(message)

    hub = Hub("127.0.0.1", handle)
    with socket.create_connection((hub.address.host, hub.address.port)) as connection:
        answers = connection.makefile("r")
        connection.sendall(json.dumps({"kind": "hello", "token": hub.address.token}).encode() + b"\n")
        assert answers.readline() == "{}\n"
        # all of it is there when the first line is read, as after a record that took its time
        lines = [{"kind": "sync", "number": 1}, *({"kind": "tick", "step": step} for step in range(3))]
        connection.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        assert json.loads(answers.readline()) == {"synced": 1, "problem": None}
        assert [next_message(messages)["kind"] for _ in range(5)] == ["hello", "sync", "tick", "tick", "tick"]
    hub.close()
