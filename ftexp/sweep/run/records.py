"""The record of a running sweep, kept through outages of its store, which trials survive too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ftexp.rundir.sweep_record import SweepRecord
from ftexp.storage.directory import Storage


class Records:
    """Writer of the record, now or as soon as that is possible again."""

    def __init__(
        self, directory: Storage, record: SweepRecord, settle: Callable[[], None], say: Callable[[str, str], None]
    ) -> None:
        """settle: called before each write. say(text, style): reports an outage, once."""
        self._directory, self._record, self._settle, self._say = directory, record, settle, say
        self.is_written = True

    @contextlib.contextmanager
    def riding_out(self) -> Iterator[None]:
        """Suppress an OSError of this block, so that trials continue; the record is written again later."""
        try:
            yield
        except OSError as error:
            if self.is_written:
                self._say(f"! the sweep's records can't be written: {error}; retrying", "yellow")
            self.is_written = False

    def write(self) -> None:
        """Write sweep.json; OSError if that fails."""
        self._settle()
        self._record.write(self._directory)
        self.is_written = True
