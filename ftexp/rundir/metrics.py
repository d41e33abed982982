"""metrics.jsonl and metrics.csv: a run's logged points, each once. Also the latest and best metrics in run.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from ftexp.rundir.names import METRICS_CSV_FILE, METRICS_FILE
from ftexp.rundir.state import RunState
from ftexp.storage.append_log import AppendLog, finite, parse_lines
from ftexp.storage.directory import Storage
from ftexp.wire.messages import Metrics

_HEAD = ("time", "split", "step", "epoch")


class MetricsLog:
    """Writer of metrics.jsonl, and of the metrics in a run's state.

    score: the metric that ranks checkpoints, and `min` or `max`. `on_point` is called with each new line.
    """

    def __init__(self, storage: Storage, state: RunState, score: tuple[str, str]) -> None:
        self._storage, self._metrics = storage, state.metrics
        self._score_name, self._score_order = score
        self._log = AppendLog(storage, METRICS_FILE)
        self._seen = {(point["split"], point["step"]) for point in self.points()}
        self.on_point: Callable[[dict[str, Any]], None] = lambda _: None

    def points(self) -> list[dict[str, Any]]:
        """Return the points of metrics.jsonl, including those that couldn't be written yet."""
        return parse_lines(self._log.lines())

    def add(self, point: Metrics) -> None:
        """Add a point, unless it was logged before a restart."""
        values = point.values
        self._metrics["last"].update(values)
        if (score := values.get(self._score_name)) is not None and self._is_best(score):
            self._metrics["best"] = {**values, "step": point.step, "epoch": point.epoch}
        if (point.split, point.step) in self._seen:
            return
        self._seen.add((point.split, point.step))
        line = finite({**{name: getattr(point, name) for name in _HEAD}, **values})
        self._log.append(json.dumps(line))
        self.on_point(line)

    def forget_after(self, step: int) -> None:
        """Remove the points after a step, which corrupt weights produced: the run will log them again.

        OSError if that fails; the points stay then.
        """
        points = self.points()
        kept = [point for point in points if point["step"] <= step]
        if len(kept) == len(points):
            return
        self._log.rewrite([json.dumps(point) for point in kept])
        self._seen = {(point["split"], point["step"]) for point in kept}
        self._metrics["best"] = {}
        for point in kept:
            values = {name: value for name, value in point.items() if name not in ("time", "split")}
            if (score := values.get(self._score_name)) is not None and self._is_best(score):
                self._metrics["best"] = values

    def _is_best(self, score: float) -> bool:
        best = self._metrics["best"].get(self._score_name)
        sign = 1 if self._score_order == "max" else -1
        return math.isfinite(score) and (best is None or sign * score > sign * best)

    def sync(self) -> None:
        """Wait until every line is durable; OSError if that fails."""
        self._log.sync()

    def close(self) -> None:
        """Release the file."""
        self._log.close()


def write_metrics_csv(storage: Storage, points: Iterable[dict[str, Any]]) -> None:
    """Write the points of metrics.jsonl as a table: a row per point, a column per metric."""
    points = list(points)
    names = list(dict.fromkeys([*_HEAD, *(name for point in points for name in point)]))
    table = io.StringIO()
    writer = csv.DictWriter(table, names, lineterminator="\n")  # None is written as ""
    writer.writeheader()
    writer.writerows(points)
    storage.write_bytes(METRICS_CSV_FILE, table.getvalue().encode())
