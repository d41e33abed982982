"""The connection between workers and driver."""

import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from ftexp.errors import FtexpError
from ftexp.wire import events
from ftexp.wire.channel import Channel
from ftexp.wire.hub import Hub, HubAddress, _skew_s
from ftexp.wire.messages import (
    Begin,
    EvaluateCheckpoint,
    Evaluated,
    Goodbye,
    GroupFailed,
    Happened,
    Hello,
    Hung,
    Lost,
    Metrics,
    Raised,
    Save,
    Stop,
    Sync,
    Synced,
    Tick,
    from_line,
    to_line,
)


@pytest.fixture
def messages():
    return queue.Queue()


@pytest.fixture
def hub(messages):
    def handle(message):
        messages.put(message)
        return Begin(7) if isinstance(message, Hello) else None

    hub = Hub("127.0.0.1", handle)
    yield hub
    hub.close()


POINT = Metrics("train", 1, 0, {"train_loss": 1.0})
SWEPT = Happened(events.Swept("x"))
FAILED = GroupFailed("crash", None, "x", "died")


def hello(rank):
    return Hello(rank, 2, 100 + rank, "n")


def next_message(messages):
    return messages.get(timeout=20)


def test_messages_arrive_in_order_and_a_hello_is_answered(hub, messages):
    channel = Channel(hub.address, hello(0))
    assert channel.answer == Begin(7)
    for step in range(100):
        channel.send(Tick(step, 0))
    channel.close()
    assert next_message(messages) == hello(0)
    assert [next_message(messages).step for _ in range(100)] == list(range(100))
    assert next_message(messages) == Goodbye()


@pytest.mark.parametrize("ahead_s", [3600, -3600])
def test_messages_of_a_node_whose_clock_is_wrong_have_the_time_of_the_drivers(hub, messages, ahead_s):
    channel = Channel(hub.address, Hello(1, 2, 99, "n", time=time.time() + ahead_s))
    channel.send(Raised(1, 5, 160, [], "x", time=time.time() + ahead_s + 100))
    channel.close()
    for after_s in (0, 100):
        assert next_message(messages).time == pytest.approx(time.time() + after_s, abs=5)


def test_what_a_message_takes_is_no_skew():
    now = time.time()
    assert [_skew_s(Hello(1, 2, 99, "n", time=when)) for when in (now, now - 0.5)] == [0, 0]
    assert _skew_s(Hello(1, 2, 99, "n", time=now - 60)) == pytest.approx(-60, abs=5)


def test_once_the_handler_has_raised_everybody_is_told_to_stop_and_nobody_waits():
    handled = []

    def handle(message):
        handled.append(type(message))
        if isinstance(message, Metrics):
            raise UnicodeEncodeError("latin-1", "⚡", 0, 1, "ordinal not in range(256)")
        return Begin(1)

    hub = Hub("127.0.0.1", handle)
    first = Channel(hub.address, hello(0))
    first.send(POINT)
    first.flush()
    first.close()  # returns once all messages were received
    assert isinstance(hub.failed, UnicodeEncodeError)
    told = Channel(hub.address, FAILED).answer
    assert isinstance(told, Stop)
    assert told.reason.startswith("the driver failed: UnicodeEncodeError: 'latin-1' codec can't encode")
    assert handled == [Hello, Metrics], "a handler that failed half-way isn't called again"
    hub.close()


def test_who_says_goodbye_stays_until_the_driver_has_handled_it_all():
    handled, held = [], threading.Event()

    def handle(message):
        assert isinstance(message, Hello) or held.wait(20)
        handled.append(type(message))

    hub = Hub("127.0.0.1", handle)
    channel = Channel(hub.address, hello(0))
    channel.send(POINT)
    closing = threading.Thread(target=channel.close)
    closing.start()
    closing.join(0.5)
    assert closing.is_alive()
    held.set()
    closing.join(20)
    hub.close()  # as when fit() returns, after the workers have exited
    assert handled == [Hello, Metrics, Goodbye]


def test_a_killed_process_is_told_at_once_and_what_it_flushed_is_not_lost(hub, messages):
    code = (
        "import os, signal, sys; from ftexp.wire.channel import *; from ftexp.wire.messages import *\n"
        "channel = Channel(HubAddress('127.0.0.1', int(sys.argv[1]), sys.argv[2]), Hello(1, 2, 7, 'n'))\n"
        "channel.send(Tick(1, 0)); channel.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    child = subprocess.run([sys.executable, "-c", code, str(hub.address.port), hub.address.token], check=False)
    assert child.returncode == -signal.SIGKILL
    assert [next_message(messages) for _ in range(3)] == [Hello(1, 2, 7, "n"), Tick(1, 0), Lost(1, 7)]


def test_who_is_killed_before_its_hello_is_answered_is_told_as_lost():
    held, messages = threading.Event(), queue.Queue()

    def handle(message):
        messages.put(message)
        assert held.wait(20)
        return Begin(7)

    hub = Hub("127.0.0.1", handle)
    hub.broadcast(Stop())  # a new connection receives it after the answer to its Hello
    with socket.create_connection((hub.address.host, hub.address.port)) as raw:
        raw.sendall(f"{hub.address.token}\n{to_line(hello(0))}".encode())
        assert next_message(messages) == hello(0)
        # closing resets it, as a kill does
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    held.set()
    assert next_message(messages) == Lost(0, 100)
    assert hub.broadcast(Save()) == 0
    hub.close()


def test_a_worker_that_outlives_its_group_is_not_heard_once_the_next_one_says_hello(hub, messages):
    past = [Channel(hub.address, hello(rank)) for rank in (0, 1)]
    past[1].send(POINT)  # messages before that are accepted
    past[1].flush()
    assert [next_message(messages) for _ in range(3)][-1] == POINT
    new = Channel(hub.address, Hello(0, 1, 200, "n"))
    for channel in past:
        channel.send(Tick(99, 0))
        channel.send(Hung(1, "in a step", 9.0, "file"))
        with pytest.raises(OSError, match="the driver has ended, or does not answer"):
            channel.sync(timeout_s=0.2)  # nor may it assume that its messages are safe
    past[0].close()
    past[1]._socket.shutdown(socket.SHUT_RDWR)  # the connection is lost
    new.send(Tick(1, 0))
    new.close()
    assert [next_message(messages) for _ in range(3)] == [Hello(0, 1, 200, "n"), Tick(1, 0), Goodbye()]
    assert messages.empty()


def test_a_worker_that_is_replaced_joins_those_that_live_and_they_stay_heard(hub, messages):
    others = [Channel(hub.address, hello(rank)) for rank in range(2)]
    new = Channel(hub.address, Hello(1, 2, 201, "n", replaces=True))
    for channel in (others[0], new):
        channel.send(Tick(1, 0))
        channel.flush()
    others[1].send(Tick(9, 0))  # from the dead worker
    others[1].flush()
    for channel in (others[0], new):
        channel.close()
    found = [next_message(messages) for _ in range(7)]
    assert found.count(Tick(1, 0)) == 2
    assert Tick(9, 0) not in found
    assert found.count(Goodbye()) == 2


def test_a_goodbye_is_not_a_loss(hub, messages):
    Channel(hub.address, hello(0)).close()
    Channel(hub.address, hello(1)).close()
    kinds = [type(next_message(messages)) for _ in range(4)]
    assert (kinds.count(Hello), kinds.count(Goodbye)) == (2, 2)


def test_a_controller_that_is_killed_is_no_lost_worker(hub, messages):
    channel = Channel(hub.address, FAILED)
    channel._socket.shutdown(socket.SHUT_RDWR)
    Channel(hub.address, hello(0)).close()
    assert [next_message(messages) for _ in range(3)] == [FAILED, hello(0), Goodbye()]


def test_a_hub_that_was_closed_leaves_neither_thread_nor_port():
    before = threading.enumerate()
    hub = Hub("127.0.0.1", lambda _: None)
    (thread,) = [thread for thread in threading.enumerate() if thread not in before]
    address = (hub.address.host, hub.address.port)
    with socket.create_connection(address) as stranger:
        stranger.sendall(b"no token\n")
        assert stranger.recv(1) == b""  # by now, the thread waits for the next connection
    hub.close()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_caller_without_the_token_is_not_heard(hub, messages):
    wrong = HubAddress(hub.address.host, hub.address.port, "guess")
    channel = Channel(wrong, hello(0))
    assert channel.answer is None
    Channel(hub.address, hello(5)).close()
    assert next_message(messages).rank == 5


def test_garbage_does_not_stop_the_hub(hub, messages):
    with socket.create_connection((hub.address.host, hub.address.port)) as raw:
        raw.sendall(b"\xff\x00 not json\n")
    Channel(hub.address, hello(3)).close()
    assert next_message(messages).rank == 3


def test_nothing_is_handled_after_close(hub, messages):
    channel = Channel(hub.address, hello(0))
    assert next_message(messages) == hello(0)
    assert hub.take(SWEPT)
    assert next_message(messages) == SWEPT
    hub.close()
    channel.send(Tick(1, 0))
    channel.close()
    assert not hub.take(SWEPT)
    assert messages.empty()


def test_a_driver_that_can_not_be_reached_is_an_error_that_says_where():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(FtexpError, match=f"can't reach the driver at 127.0.0.1:{port}"):
        Channel(HubAddress("127.0.0.1", port, "t"), hello(0))


def test_a_worker_goes_on_when_the_driver_is_gone():
    hub = Hub("127.0.0.1", lambda message: None)
    channel = Channel(hub.address, hello(0))
    channel._socket.shutdown(socket.SHUT_RDWR)
    for _ in range(10):
        channel.send(Tick(1, 0))
    channel.flush()  # would wait forever if the error had ended the sending thread
    hub.close()


def answer_syncs(message):
    return Synced(message.number) if isinstance(message, Sync) else None


@pytest.mark.parametrize("word", [Stop(), Save()])
def test_every_open_channel_is_told_to_stop_or_save_and_still_hears_whether_its_messages_are_safe(word):
    hub = Hub("127.0.0.1", answer_syncs)
    assert hub.broadcast(Save()) == 0
    channels = [Channel(hub.address, hello(rank)) for rank in range(2)]
    for channel in channels:
        channel.sync()
        assert (channel.stop_requested, channel.save_requested) == (False, False)
    assert hub.broadcast(word) == 2
    for channel in channels:
        channel.sync()  # its answer comes after the broadcast, on the same channel
        assert (channel.stop_requested, channel.save_requested) == (word == Stop(), word == Save())
    for channel in channels:
        channel.close()
    hub.close()


def test_a_worker_waits_for_the_evaluation_of_its_checkpoint_and_is_passed_no_other(hub):
    channel, found = Channel(hub.address, hello(0)), []
    waiting = threading.Thread(target=lambda: found.append(channel.evaluated("step_8.a1")))
    waiting.start()
    other, wanted = Evaluated(4, 0, "step_4.a1", {"val_loss": 2.0}), Evaluated(8, 1, "step_8.a1", {"val_loss": 1.0})
    while not hub.broadcast(other):  # until the hub has accepted the connection
        pass
    hub.broadcast(wanted)
    waiting.join(20)
    assert found == [wanted]
    assert channel.evaluated("step_4.a1") == other
    channel.close()


def test_a_worker_waits_for_no_evaluation_once_the_run_is_to_stop_or_the_driver_is_gone(hub):
    channel = Channel(hub.address, hello(0))
    while not hub.broadcast(Stop()):
        pass
    assert channel.evaluated("step_8.a1") is None
    channel.close()
    hub.close()
    channel.stop_requested = False
    with pytest.raises(ConnectionError, match="the driver is gone"):
        channel.evaluated("step_8.a1")


def test_a_channel_that_opens_after_the_run_was_told_to_stop_is_told_too():
    hub = Hub("127.0.0.1", answer_syncs)
    hub.broadcast(Save())
    before = Channel(hub.address, hello(0))
    before.sync()
    assert (before.stop_requested, before.save_requested) == (False, False)
    hub.broadcast(Stop())
    after = Channel(hub.address, hello(1))
    after.sync()
    assert after.stop_requested
    for channel in (before, after):
        channel.close()
    hub.close()


def test_a_channel_that_said_goodbye_is_not_asked_to_stop(hub, messages):
    before = {*threading.enumerate()}  # including threads of other tests, which may never end
    Channel(hub.address, hello(0)).close()
    assert [next_message(messages) for _ in range(2)] == [hello(0), Goodbye()]
    for thread in {*threading.enumerate()} - before:
        if "_serve" in thread.name:
            thread.join(timeout=5)
    assert hub.broadcast(Stop()) == 0


def test_what_comes_while_a_sync_is_handled_is_not_lost(messages):
    def handle(message):
        messages.put(message)
        return answer_syncs(message)

    hub = Hub("127.0.0.1", handle)
    with socket.create_connection((hub.address.host, hub.address.port)) as connection:
        answers = connection.makefile("r")
        connection.sendall(f"{hub.address.token}\n{to_line(hello(0))}".encode())
        assert from_line(answers.readline()) is None
        # all lines have arrived when the first one is read, as after a slow write of the record
        sent = [Sync(1), *(Tick(step, 0) for step in range(3))]
        connection.sendall("".join(map(to_line, sent)).encode())
        assert from_line(answers.readline()) == Synced(1)
        assert [next_message(messages) for _ in range(5)] == [hello(0), *sent]
    hub.close()


EVERY_MESSAGE = [
    EvaluateCheckpoint(8, 1, "a"), Evaluated(8, 1, "a", {"val_loss": 1.0}), Evaluated(8, 1, "a", {}, "failed", "why"),
    hello(0), POINT, SWEPT, Begin(3, [[0, 32]], 2), Stop("x"), FAILED,
    Happened(events.Chaos("truncate_checkpoint", 0, 5, ["step_5.a1"])), Happened(events.Restored(0, 0.5, "a", 1, 32)),
]  # fmt: skip


@pytest.mark.parametrize("message", EVERY_MESSAGE)
def test_a_message_is_the_same_once_it_was_a_line(message):
    line = to_line(message)
    assert from_line(line) == message
    assert from_line(line).time == message.time
    assert line.count("\n") == 1


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_a_kill_has_cut_short_holds_no_message(cut):
    assert from_line(to_line(POINT)[: -1 - cut]) is None


@pytest.mark.parametrize(
    "line",
    [
        "", "null", "3", '"tick"', "[]", "{}", '{"kind": []}', '{"kind": "unheard_of"}', '{"kind": "message"}',
        '{"kind": "tick", "step": 3}', '{"kind": "tick", "step": 3, "epoch": 0, "more": 1}',
        '{"kind": "happened"}', '{"kind": "happened", "event": ["unheard_of", {}]}', '{"kind": "happened", "event": 1}',
        '{"kind": "happened", "event": ["swept", {"file": 3}]}', '{"kind": "happened", "event": ["swept", 3]}',
    ],
)  # fmt: skip
def test_what_is_no_message_is_none(line):
    assert from_line(line) is None
