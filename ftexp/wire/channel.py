"""A worker's end of its connection to the driver."""

from __future__ import annotations

import queue
import socket
import threading

from ftexp.errors import FtexpError
from ftexp.wire.hub import HubAddress
from ftexp.wire.messages import Evaluated, Goodbye, Message, Save, Stop, Sync, Synced, from_line, to_line

_CONNECT_TIMEOUT_S = 30.0
_GOODBYE_S = 10.0  # time limit for sending the remaining messages, and again for the driver to handle them


class Channel:
    """Connection to the driver. `send` returns at once; `sync` waits until the driver has handled all messages."""

    def __init__(self, address: HubAddress, first: Message) -> None:
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout=_CONNECT_TIMEOUT_S)
            # two streams, since one thread writes while another reads
            self._stream = self._socket.makefile("w", encoding="utf-8")
            self._incoming = self._socket.makefile("r", encoding="utf-8")
            self._stream.write(f"{address.token}\n{to_line(first)}")
            self._stream.flush()
            self.answer = from_line(self._incoming.readline())  # answer to the first message
        except (OSError, ValueError) as error:
            raise FtexpError(
                f"this worker can't reach the driver at {address.host}:{address.port} ({error}); "
                "Ray needs every port open between its nodes"
            ) from error
        self._socket.settimeout(None)
        self._queue: queue.Queue[Message | None] = queue.Queue()
        self._synced = Synced(0)  # the last answer
        self._num_asked = 0
        self._broken = False
        self.stop_requested = self.save_requested = False  # whether the driver has requested these
        self._evaluated: dict[str, Evaluated] = {}  # results by name of the checkpoint
        self._answered = threading.Condition()
        self._thread = threading.Thread(target=self._send_all, daemon=True, name="channel-to-driver")
        self._thread.start()
        threading.Thread(target=self._receive_all, daemon=True, name="channel-from-driver").start()

    def send(self, message: Message) -> None:
        """Queue a message."""
        self._queue.put(message)

    def flush(self) -> None:
        """Wait until the operating system has every message; it delivers them even if this process is killed."""
        self._queue.join()

    def sync(self, timeout_s: float = 60.0) -> None:
        """Wait until the driver has recorded all messages so far; OSError if it can't write them or is dead."""
        with self._answered:
            self._num_asked += 1
            number = self._num_asked
            self.send(Sync(number))
            self._answered.wait_for(lambda: self._synced.number >= number or self._broken, timeout_s)
            if self._synced.number < number:
                raise ConnectionError("the driver has ended, or does not answer")
            if self._synced.problem is not None:
                raise OSError(f"the run's records can't be written: {self._synced.problem}")

    def evaluated(self, checkpoint: str) -> Evaluated | None:
        """Wait until `checkpoint` has been evaluated, and return the result; None if a stop is requested before.

        ConnectionError if the driver dies.
        """
        with self._answered:
            self._answered.wait_for(lambda: checkpoint in self._evaluated or self.stop_requested or self._broken)
            if (found := self._evaluated.get(checkpoint)) is None and self._broken:
                raise ConnectionError("the driver is gone")
            return found

    def note_evaluated(self, message: Evaluated) -> None:
        """Let `evaluated` return `message`."""
        with self._answered:
            self._evaluated[message.checkpoint] = message
            self._answered.notify_all()

    def close(self) -> None:
        """Say goodbye, and wait until the driver has handled all messages and closed the connection."""
        self.send(Goodbye())
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
                    self._stream.write(to_line(message))
                    self._stream.flush()
            except OSError:
                self._break()
            finally:
                self._queue.task_done()

    def _receive_all(self) -> None:
        try:
            for line in self._incoming:
                self._receive(from_line(line))
        except (OSError, ValueError):
            pass
        self._break()

    def _receive(self, message: Message | None) -> None:
        match message:
            case Stop():
                with self._answered:
                    self.stop_requested = True
                    self._answered.notify_all()
            case Evaluated():
                self.note_evaluated(message)
            case Save():
                self.save_requested = True
            case Synced():
                with self._answered:
                    self._synced = message
                    self._answered.notify_all()

    def _break(self) -> None:
        """Note that the driver is gone. Ray will end this process soon."""
        with self._answered:
            self._broken = True
            self._answered.notify_all()
