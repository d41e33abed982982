"""Connections between workers and driver: JSON lines over TCP, sent by a thread, so training never waits.

Ray's report() handles one item per poll and blocks all ranks; it is used only for checkpoints. Ray already needs
workers and driver to reach each other on any port, so this asks no more of the network. The driver is the only writer
of the run's records, which therefore need no locks. A closed connection shows a process's death at once, seconds before
Ray polls it.

A worker may outlive its group: after a network outage, Ray takes it for dead, but its messages arrive once the network
is back. From the next group's first hello on, they are ignored: they would be taken for that group's messages.

Senders date their messages. If a node's clock differs from the driver's, the hub corrects the dates, so the records
have one clock. The first message, which is sent at once, shows the difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from ftexp.wire.messages import Evaluated, Goodbye, Hello, Lost, Message, Save, Stop, Sync, from_line, to_line

_MIN_SKEW_S = 1.0  # smallest clock difference that is corrected; less may be the message's own delay

Handler = Callable[[Message], Message | None]


@dataclass(frozen=True)
class HubAddress:
    """The address on which the driver listens, and the token that a client must send."""

    host: str
    port: int
    token: str


class Hub:
    """The driver's end of the connections. Calls `handler(message)` for each message, one at a time."""

    def __init__(self, host: str, handler: Handler) -> None:
        self._handler = handler
        self._lock = threading.Lock()
        self._closed = self._stopping = False
        self.failed: Exception | None = None  # raised by the handler; from then on, every message is answered by Stop
        self._open: list[socket.socket] = []
        self._group: dict[int, Hello] = {}  # workers of the latest group, by rank
        self._listener = socket.create_server((host, 0))
        self.address = HubAddress(host, self._listener.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self._accept, daemon=True, name="hub").start()

    def broadcast(self, message: Stop | Save | Evaluated) -> int:
        """Send `message` to every open channel; return the number of channels that it was sent to.

        A channel that opens after a `Stop` gets one too.
        """
        with self._lock:
            num_sent, self._stopping = 0, self._stopping or isinstance(message, Stop)
            for connection in self._open:
                with contextlib.suppress(OSError):  # the worker has died
                    _send(connection, message)
                    num_sent += 1
            return num_sent

    def close(self) -> None:
        """Stop listening; no message is handled after this returns. Open channels end with their processes."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(OSError):  # raised on macOS; on Linux, this makes accept() return and frees the port
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Handle a connection. First line: the token. Then one message a line; the first one is always answered."""
        # answers bypass the stream: a stream that reads and writes loses its read-ahead buffer when it is written to
        with connection, connection.makefile("r", encoding="utf-8", errors="replace") as stream:
            if not hmac.compare_digest(self._next(stream).strip().encode(), self.address.token.encode()):
                return
            first = from_line(self._next(stream))
            skew_s = _skew_s(first)
            first = _redated(first, skew_s)
            if isinstance(first, Hello):
                self._joins(first)
            self._answer(connection, self.handle(first) if first is not None else None)
            with self._lock:
                self._open.append(connection)
                if self._stopping:
                    self._answer(connection, Stop())
            said_goodbye = False
            while not said_goodbye and (line := self._next(stream)):
                if (message := _redated(from_line(line), skew_s)) is None:
                    continue
                said_goodbye = isinstance(message, Goodbye)
                answer = self.handle(message) if self._is_current(first) else None
                if isinstance(message, Sync) and answer is not None:
                    self._answer(connection, answer)
            with self._lock:
                self._open.remove(connection)
            if isinstance(first, Hello) and not said_goodbye and self._is_current(first):
                self.handle(Lost(first.rank, first.pid))

    def _joins(self, hello: Hello) -> None:
        """Add a worker to the latest group, or start the next group if its rank is taken."""
        with self._lock:
            if hello.rank in self._group and not hello.replaces:
                self._group = {}
            self._group[hello.rank] = hello

    def _is_current(self, first: Message | None) -> bool:
        """Return False if the sender of `first` is a worker of an earlier group, or one that was replaced."""
        with self._lock:
            return not isinstance(first, Hello) or self._group.get(first.rank) is first

    @staticmethod
    def _answer(connection: socket.socket, message: Message | None) -> None:
        with contextlib.suppress(OSError):  # the worker was killed: reading the next line fails
            _send(connection, message)

    @staticmethod
    def _next(stream: TextIO) -> str:
        try:
            return stream.readline()
        except OSError:  # reset by a killed process
            return ""

    def handle(self, message: Message) -> Message | None:
        """Pass the handler a message as if a worker had sent it; return the answer."""
        with self._lock:
            return self._handled(message) if not self._closed else None

    def take(self, message: Message) -> bool:
        """Like `handle`, for messages without an answer; return False if the hub was closed before."""
        with self._lock:
            if not self._closed:
                self._handled(message)
            return not self._closed

    def _handled(self, message: Message) -> Message | None:
        """Return the handler's answer; once it has raised, always a Stop, so that no sender waits for a decision."""
        if self.failed is None:
            try:
                return self._handler(message)
            except Exception as error:  # raised again by the thread that waits for the run
                self.failed = error
        return Stop(f"the driver failed: {type(self.failed).__name__}: {self.failed}")


def _skew_s(first: Message | None) -> float:
    """Return the seconds by which the sender's clock is ahead; `first` was sent just now."""
    ahead_s = first.time - time.time() if first is not None else 0.0
    return ahead_s if abs(ahead_s) >= _MIN_SKEW_S else 0.0


def _redated(message: Message | None, skew_s: float) -> Message | None:
    return dataclasses.replace(message, time=message.time - skew_s) if message is not None and skew_s else message


def _send(connection: socket.socket, message: Message | None) -> None:
    connection.sendall(to_line(message).encode())
