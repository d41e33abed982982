"""The line between workers and the driver: JSON lines over TCP, sent by a thread, so training never waits.

Ray's own report() takes one item a poll and blocks all ranks; it is kept for checkpoints. Ray already needs
workers and driver to reach each other on any port, so this asks for no more of a network. The driver is the
only writer of the run's records, which therefore need no locks. A closed line also tells at once that a
process has died, seconds before Ray polls it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from ftexp.errors import FtexpError

Message = dict[str, Any]
Handler = Callable[[Message], Message | None]

SYNC = "sync"  # kind of the message that asks whether what came before is safe; answered with its number as "synced"
STOP, SAVE = "stop", "save"  # what the hub tells its lines: the run shall end, or save soon
LOST = "lost"  # kind of the message that the hub makes when a line closes without a goodbye
_CONNECT_TIMEOUT_S = 30.0
_GOODBYE_S = 10.0  # for what is still to be sent, and for the driver to take it in


@dataclass(frozen=True)
class HubAddress:
    """Where the driver listens, and the token that a caller must show."""

    host: str
    port: int
    token: str


class Hub:
    """The driver's end. Calls `handler(message)` for each message, one at a time."""

    def __init__(self, host: str, handler: Handler) -> None:
        self._handler = handler
        self._lock = threading.Lock()
        self._closed = self._stopping = False
        self.failed: Exception | None = None  # raised by the handler; nothing is handled any more, and all shall end
        self._open: list[socket.socket] = []
        self._listener = socket.create_server((host, 0))
        self.address = HubAddress(host, self._listener.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self._accept, daemon=True, name="hub").start()

    def tell(self, word: str) -> int:
        """Tell every open line to STOP (after a last save) or to SAVE; returns how many there are.

        Lines that are opened later are told to STOP as well.
        """
        with self._lock:
            told, self._stopping = 0, self._stopping or word == STOP
            for connection in self._open:
                with contextlib.suppress(OSError):  # died since
                    _send(connection, {word: True})
                    told += 1
            return told

    def close(self) -> None:
        """Stop listening; no message is handled after this returns. Open lines end with their processes."""
        with self._lock:
            self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """First line: the token and who calls, answered by the handler. Then one message a line."""
        # answers go past the stream: one that reads and writes forgets, when written to, what it has read ahead
        with connection, connection.makefile("r", encoding="utf-8", errors="replace") as stream:
            hello = self._read(self._next(stream))
            if not hmac.compare_digest(str(hello.pop("token", "")), self.address.token):
                return
            self._answer(connection, self.handle(hello) or {})
            with self._lock:
                self._open.append(connection)
                if self._stopping:
                    self._answer(connection, {STOP: True})
            said_goodbye = False
            while not said_goodbye and (line := self._next(stream)):
                message = self._read(line)
                said_goodbye = said_goodbye or message.get("kind") == "goodbye"
                answer = self.handle(message)
                if message.get("kind") == SYNC and answer is not None:
                    self._answer(connection, answer)
            with self._lock:
                self._open.remove(connection)
            if not said_goodbye:
                self.handle({**hello, "kind": LOST, "time": time.time()})

    @staticmethod
    def _answer(connection: socket.socket, message: Message) -> None:
        with contextlib.suppress(OSError):  # killed since: the next line tells
            _send(connection, message)

    @staticmethod
    def _next(stream: TextIO) -> str:
        try:
            return stream.readline()
        except OSError:  # reset by a killed process
            return ""

    @staticmethod
    def _read(line: str) -> Message:
        try:
            message = json.loads(line)
        except ValueError:  # a line cut short by a kill
            return {}
        return message if isinstance(message, dict) else {}

    def handle(self, message: Message) -> Message | None:
        """Give the handler a message, as if a worker had sent it; returns its answer."""
        with self._lock:
            return self._handled(message) if message.get("kind") and not self._closed else None

    def take(self, message: Message) -> bool:
        """As `handle`, where there is no answer; False if the hub was closed before."""
        with self._lock:
            if not self._closed:
                self._handled(message)
            return not self._closed

    def _handled(self, message: Message) -> Message | None:
        """The handler's answer; once it has raised, always one that ends whoever asks: nobody waits for a decision."""
        if self.failed is None:
            try:
                return self._handler(message)
            except Exception as error:  # raised again on the thread that waits for the run
                self.failed = error
        return {STOP: f"the driver failed: {type(self.failed).__name__}: {self.failed}"}


def _send(connection: socket.socket, message: Message) -> None:
    connection.sendall((json.dumps(message) + "\n").encode())


class Line:
    """A worker's end. `send` returns at once; `sync` waits until the driver has handled everything so far."""

    def __init__(self, address: HubAddress, hello: Message) -> None:
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S)
            # two, since a thread writes while another reads
            self._stream = self._socket.makefile("w", encoding="utf-8")
            self._incoming = self._socket.makefile("r", encoding="utf-8")
            self._stream.write(json.dumps({**hello, "token": address.token}) + "\n")
            self._stream.flush()
            self.answer: Message = json.loads(self._incoming.readline() or "null") or {}
        except (OSError, ValueError) as error:
            raise FtexpError(
                f"this worker can't reach the driver at {address.host}:{address.port} ({error}); "
                "Ray needs every port open between its nodes"
            ) from error
        self._socket.settimeout(None)
        self._queue: queue.Queue[Message | None] = queue.Queue()
        self._synced = 0  # number of the last sync that was answered
        self._asked = 0
        self._problem: str | None = None  # what the driver said with its last answer
        self._broken = False
        self.stop_requested = self.save_requested = False  # by the driver
        self._answered = threading.Condition()
        self._thread = threading.Thread(target=self._send_all, daemon=True, name="line-to-driver")
        self._thread.start()
        threading.Thread(target=self._receive_all, daemon=True, name="line-from-driver").start()

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message; its time is now."""
        self._queue.put({"kind": kind, "time": time.time(), **fields})

    def flush(self) -> None:
        """Return when every message so far is with the operating system, which delivers it even after a kill."""
        self._queue.join()

    def sync(self, timeout_s: float = 60.0) -> None:
        """Return when what was sent so far is safe with the driver; OSError if it isn't, or the driver is dead."""
        with self._answered:
            self._asked += 1
            number = self._asked
            self.send(SYNC, number=number)
            self._answered.wait_for(lambda: self._synced >= number or self._broken, timeout_s)
            if self._synced < number:
                raise ConnectionError("the driver is gone, or does not answer")
            if self._problem is not None:
                raise OSError(f"the run's records can't be written: {self._problem}")

    def close(self) -> None:
        """Say goodbye, and return when the driver has handled all that was sent: it hangs up then."""
        self.send("goodbye")
        self._queue.put(None)
        self._thread.join(timeout=_GOODBYE_S)
        with self._answered:
            self._answered.wait_for(lambda: self._broken, _GOODBYE_S)
        self._socket.close()

    def _send_all(self) -> None:
        while True:
            message = self._queue.get()
            try:
                if message is None:
                    return
                if not self._broken:
                    self._stream.write(json.dumps(message) + "\n")
                    self._stream.flush()
            except OSError:
                self._break()
            finally:
                self._queue.task_done()

    def _receive_all(self) -> None:
        try:
            for line in self._incoming:
                message = json.loads(line)
                if message.get(STOP):
                    self.stop_requested = True
                    continue
                if message.get(SAVE):
                    self.save_requested = True
                    continue
                with self._answered:
                    self._synced, self._problem = message["synced"], message.get("problem")
                    self._answered.notify_all()
        except (OSError, ValueError):
            pass
        self._break()

    def _break(self) -> None:
        """The driver is gone, and Ray ends this process in a moment."""
        with self._answered:
            self._broken = True
            self._answered.notify_all()
