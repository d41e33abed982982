"""The page of a sweep: its charts, and the values of its template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

from ftexp.report.drawing import Drawing
from ftexp.report.rendering import render
from ftexp.report.series import duration, minute
from ftexp.report.sweep_charts import curves_chart, learning_curve, parallel_chart, trial_lines
from ftexp.report.text import cut, plain
from ftexp.rundir.ranking import ranked, varying
from ftexp.rundir.state import FAILED, FINISHED
from ftexp.rundir.sweep_record import Reached, look
from ftexp.storage.directory import Storage

_WIDE = 1000.0
_MAX_LINES = 300  # trials in a chart, the best ones: more lines would be a solid area
_STATUS = {FINISHED: "good", FAILED: "bad"}
_METRICS = ("val_accuracy", "val_loss", "test_accuracy", "test_loss")  # metrics that get a column if trials have them


class SweepReport:
    """The report of a sweep. `charts`: {name of the PNG: drawing}."""

    def __init__(self, directory: Storage, run_report: str) -> None:
        """run_report: file name of a trial's own report; ConfigError if there is no sweep."""
        self._directory, self._run_report = directory, run_report
        self._record, trials = look(directory)
        self._ordered = ranked(self._record, trials)
        self._keys = varying(self._record, self._ordered) or self._record.keys
        self._lines = trial_lines(self._record, self._ordered, self._keys)
        few = zip(self._lines[:_MAX_LINES], self._ordered, strict=False)
        self._curves = [(line, learning_curve(directory, self._record, each)) for line, each in few]
        self.charts = dict(self._charts(_WIDE))

    def _charts(self, width: float | None) -> Iterator[tuple[str, Drawing]]:
        metric, lines = self._record.metric, self._lines[:_MAX_LINES]
        if any(line.score is not None for line in lines):
            yield "trials", parallel_chart(lines, self._keys, metric, width)
        if any(points for _, points in self._curves):
            yield "curves", curves_chart(metric, self._curves, width)

    def html(self) -> str:
        """Return the whole HTML file."""
        record, counts = self._record, Counter(each.status for each in self._ordered)
        all_done = 0 < counts[FINISHED] == len(self._ordered)
        there = {name for each in self._ordered for name in each.last}
        trials = list(zip(self._lines, self._ordered, map(self._link, self._ordered), strict=True))
        return render(
            "sweep.html",
            name=cut(record.name, 200),
            state="finished" if all_done else f"{counts[FINISHED]:,} of {len(self._ordered):,} finished",
            kind="good" if all_done else "bad" if counts[FAILED] else "paused",
            record=record,
            keys=self._keys,
            began=minute(record.started),
            uri=self._directory.uri,
            numbers=self._numbers(counts),
            metrics=[name for name in _METRICS if name in there and name != record.metric],
            kinds=_STATUS,
            trials=trials,
            failed=[row for row in trials if row[1].trial.error is not None],
            charts=self.charts,
            narrow=dict(self._charts(None)),
            max_lines=_MAX_LINES,
        )

    def _numbers(self, counts: Counter[str]) -> Iterator[tuple[str, str, str]]:
        best = self._lines[0] if self._lines and self._lines[0].finished else None
        if best is not None and best.score is not None:
            values = ", ".join(f"{key}={value}" for key, value in best.values.items())
            yield f"best {self._record.metric}", f"{best.score:.4f}", cut(values, 120)
        others = ", ".join(f"{number:,} {status}" for status, number in counts.items() if status != FINISHED)
        yield "trials", f"{len(self._ordered):,}", others or "all finished"
        states = [each.state for each in self._ordered if each.state is not None]
        yield (
            "time of all trials",
            duration(sum(state.seconds for state in states)),
            "summed over parallel trials",
        )
        yield "failures", f"{sum(len(state.failures) for state in states):,}", "of workers and drivers, in all trials"

    def _link(self, each: Reached) -> str | None:
        """Return the link to the trial's own report, if there is one."""
        path = self._directory.local_path
        if path is None or not (path / each.trial.name / self._run_report).is_file():
            return None
        return f"{quote(plain(each.trial.name))}/{self._run_report}"
