"""The line between workers and the driver: JSON lines over TCP, sent by a thread, so training never waits.

Ray's own report() takes one item a poll and blocks all ranks; it is kept for checkpoints. Ray already needs
workers and driver to reach each other on any port, so this asks for no more of a network. The driver is the
only writer of the run's records, which therefore need no locks. A closed line also tells at once that a
process has died, seconds before Ray polls it.
"""

from __future__ import annotations

import hmac
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftexp.errors import FtexpError

Message = dict[str, Any]
Handler = Callable[[Message], Message | None]

LOST = "lost"  # kind of the message that the hub makes when a line closes without a goodbye
_CONNECT_TIMEOUT_S = 30.0


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
        self._closed = False
        self._listener = socket.create_server((host, 0))
        self.address = HubAddress(host, self._listener.getsockname()[1], secrets.token_hex(16))
        threading.Thread(target=self._accept, daemon=True, name="hub").start()

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
        with connection, connection.makefile("rw", encoding="utf-8", errors="replace") as stream:
            hello = self._read(stream.readline())
            if not hmac.compare_digest(str(hello.pop("token", "")), self.address.token):
                return
            answer = self._handle(hello)
            stream.write(json.dumps(answer or {}) + "\n")
            stream.flush()
            said_goodbye = False
            try:
                for line in stream:
                    message = self._read(line)
                    said_goodbye = said_goodbye or message.get("kind") == "goodbye"
                    self._handle(message)
            except OSError:  # reset by a killed process
                pass
            if not said_goodbye:
                self._handle({**hello, "kind": LOST, "time": time.time()})

    @staticmethod
    def _read(line: str) -> Message:
        try:
            message = json.loads(line)
        except ValueError:  # a line cut short by a kill
            return {}
        return message if isinstance(message, dict) else {}

    def _handle(self, message: Message) -> Message | None:
        with self._lock:
            return self._handler(message) if message.get("kind") and not self._closed else None


class Line:
    """A worker's end. `send` returns at once; `flush` waits until all has left this process."""

    def __init__(self, address: HubAddress, hello: Message) -> None:
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S)
            self._stream = self._socket.makefile("rw", encoding="utf-8")
            self._stream.write(json.dumps({**hello, "token": address.token}) + "\n")
            self._stream.flush()
            self.answer: Message = json.loads(self._stream.readline() or "null") or {}
        except (OSError, ValueError) as error:
            raise FtexpError(
                f"this worker can't reach the driver at {address.host}:{address.port} ({error}); "
                "Ray needs every port open between its nodes"
            ) from error
        self._socket.settimeout(None)
        self._queue: queue.Queue[Message | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, daemon=True, name="line-to-driver")
        self._thread.start()

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message; its time is now."""
        self._queue.put({"kind": kind, "time": time.time(), **fields})

    def flush(self) -> None:
        """Return when every message so far is with the operating system, which delivers it even after a kill."""
        self._queue.join()

    def close(self) -> None:
        """Say goodbye and hang up."""
        self.send("goodbye")
        self._queue.put(None)
        self._thread.join(timeout=10)
        self._socket.close()

    def _send_all(self) -> None:
        broken = False
        while True:
            message = self._queue.get()
            try:
                if message is None:
                    return
                if not broken:
                    self._stream.write(json.dumps(message) + "\n")
                    self._stream.flush()
            except OSError:  # the driver is gone, and Ray ends this process in a moment
                broken = True
            finally:
                self._queue.task_done()
