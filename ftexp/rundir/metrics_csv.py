"""metrics.csv: the points of metrics.jsonl as a table, for spreadsheets. One row a point, one column a metric."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable
from typing import Any

from ftexp.storage.append_log import AppendLog
from ftexp.storage.directory import Storage

CSV_FILE = "metrics.csv"
_HEAD = ("time", "split", "step", "epoch")


class MetricsCsv:
    """Grows by a row a point; a metric that is new in the run, which is rare, has the whole table written again.

    `points` returns all of them, the newest last: metrics.jsonl is what is true, and the table can be made of it.
    """

    def __init__(self, storage: Storage, points: Callable[[], list[dict[str, Any]]]) -> None:
        self._storage, self._points = storage, points
        self._columns: list[str] = []
        self._log: AppendLog | None = None  # None: the table has to be written again

    def append(self, point: dict[str, Any]) -> None:
        """Add the newest point, which `points` returns already."""
        if self._log is None:
            return  # sync() writes it
        if all(name in self._columns for name in point):
            self._log.append(_row(point.get(name) for name in self._columns))
        else:
            with contextlib.suppress(OSError):  # what it lacks is written anew
                self._log.close()
            self._log = None

    def sync(self) -> None:
        """Return when every point is in the table; OSError if that can't be done."""
        if self._log is None:
            points = self._points()
            names = dict.fromkeys([*_HEAD, *(name for point in points for name in point)])
            self._columns = list(names)
            rows = [_row(self._columns), *(_row(point.get(name) for name in self._columns) for point in points)]
            self._storage.write_bytes(CSV_FILE, "".join(f"{row}\n" for row in rows).encode())
            self._log = AppendLog(self._storage, CSV_FILE)
        self._log.flush()

    def close(self) -> None:
        """As `sync`, and release the file."""
        self.sync()
        assert self._log is not None, "sync made it"
        self._log.close()
        self._log = None


def _row(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow("" if value is None else value for value in values)
    return text.getvalue()
