"""events.jsonl: what happened in a run. Its schema is in ftexp.wire.events."""

from __future__ import annotations

from typing import Any

from ftexp.rundir.names import EVENTS_FILE
from ftexp.rundir.state import RunState
from ftexp.storage.append_log import AppendLog, as_json, parse_lines
from ftexp.storage.directory import Storage
from ftexp.wire.events import Event


class EventLog:
    """Writer of events.jsonl. A line has the attempt and step that `state` has when it is added."""

    def __init__(self, storage: Storage, state: RunState) -> None:
        self._log, self._state = AppendLog(storage, EVENTS_FILE), state

    def add(self, event: Event, time: float) -> None:
        """Add a line."""
        head = {"time": time, "event": event.name, "attempt": self._state.attempts, "step": self._state.step}
        self._log.append(as_json({**head, **event.fields}))

    def lines(self) -> list[dict[str, Any]]:
        """Return the events of events.jsonl, including those that couldn't be written yet."""
        return parse_lines(self._log.lines())

    def sync(self) -> None:
        """Wait until every line is durable; OSError if that fails."""
        self._log.sync()

    def close(self) -> None:
        """Release the file."""
        self._log.close()
