"""The page of a sweep: leaderboard, parallel coordinates, learning curves, and what failed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import quote

from ftexp.report.drawing import Drawing, svg
from ftexp.report.frame import document, section, tile
from ftexp.report.markup import Child, Markup, cut, element, plain
from ftexp.report.series import duration
from ftexp.report.sweep_charts import TrialLine, curves_chart, parallel_chart
from ftexp.report.tables import table
from ftexp.rundir.ranking import has_place, ranked, varying
from ftexp.rundir.state import FAILED, FINISHED
from ftexp.rundir.sweep_record import Reached, curve, look
from ftexp.storage.directory import Storage

_WIDE = 1000.0
_MOST_LINES = 300  # of a chart: the best, since more would be a surface
_ERROR_LETTERS, _NAME_LETTERS = 300, 60
_STATUS = {FINISHED: "good", FAILED: "bad"}
_METRICS = ("val_accuracy", "val_loss", "test_accuracy", "test_loss")  # that get a column, where trials have them


class SweepReport:
    """A sweep, drawn. `charts` are by the name of their PNG."""

    def __init__(self, folder: Storage, run_report: str) -> None:
        """`run_report`: what a trial's own report is called in its directory; ConfigError if there is no sweep."""
        self._folder, self._run_report = folder, run_report
        self._ledger, trials = look(folder)
        self._ordered = ranked(self._ledger, trials)
        self._keys = varying(self._ledger, self._ordered) or self._ledger.keys
        self._lines = [self._line(number, each) for number, each in enumerate(self._ordered)]
        self._curves = [
            (line, [(float(x), y) for x, y in curve(folder, each.trial, self._ledger.metric)])
            for line, each in zip(self._lines[:_MOST_LINES], self._ordered, strict=False)
        ]
        self.charts = dict(self._charts())

    def _line(self, place: int, each: Reached) -> TrialLine:
        values = {key: each.trial.values.get(key, "") for key in self._keys}
        score = each.value(self._ledger.metric)
        return TrialLine(each.trial.name, values, score, has_place(self._ledger, each), place)

    def _charts(self) -> Iterator[tuple[str, Drawing]]:
        metric, lines = self._ledger.metric, self._lines[:_MOST_LINES]
        if any(line.score is not None for line in lines):
            yield "trials", parallel_chart(lines, self._keys, metric, _WIDE)
        if any(points for _, points in self._curves):
            yield "curves", curves_chart(metric, self._curves, _WIDE)

    def html(self) -> str:
        """The whole file."""
        return document(cut(self._ledger.name, 200), self._header(), *self._sections())

    def _header(self) -> Markup:
        ledger = self._ledger
        counts = Counter(each.status for each in self._ordered)
        swept = ", ".join(self._keys)
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(ledger.started))
        all_done = 0 < counts[FINISHED] == len(self._ordered)
        status = "finished" if all_done else f"{counts[FINISHED]:,} of {len(self._ordered):,} finished"
        kind = "good" if all_done else "bad" if counts[FAILED] else "paused"
        return element(
            "header",
            element("h1", cut(ledger.name, 200), " ", element("span", status, class_=f"status {kind}")),
            element(
                "p", f"sweep of {cut(swept, 300)} for the {ledger.mode} of {ledger.metric} · {began}", class_="faint"
            ),
            element("p", element("code", self._folder.uri), class_="faint"),
            element("dl", (tile(*one) for one in self._numbers(counts)), class_="tiles"),
        )

    def _numbers(self, counts: Counter[str]) -> Iterator[tuple[str, str, str]]:
        best = self._lines[0] if self._lines and self._lines[0].finished else None
        if best is not None and best.score is not None:
            told = ", ".join(f"{key}={value}" for key, value in best.values.items())
            yield f"best {self._ledger.metric}", f"{best.score:.4f}", cut(told, 120)
        others = ", ".join(f"{number:,} {status}" for status, number in counts.items() if status != FINISHED)
        yield "trials", f"{len(self._ordered):,}", others or "all finished"
        states = [each.state for each in self._ordered if each.state is not None]
        yield (
            "time of all trials",
            duration(sum(state.seconds for state in states)),
            "side by side, so more than it took",
        )
        yield "failures", f"{sum(len(state.failures) for state in states):,}", "of workers and drivers, in all trials"

    def _sections(self) -> Iterator[Markup]:
        yield section("Leaderboard", self._leaderboard())
        left_out = len(self._ordered) - _MOST_LINES
        only = f" The best {_MOST_LINES} trials; {left_out:,} more are in the table." if left_out > 0 else ""
        if "trials" in self.charts:
            narrow = parallel_chart(self._lines[:_MOST_LINES], self._keys, self._ledger.metric, None)
            note = "A line is a trial; the stronger, the better." + only
            yield section("Parallel coordinates", _figures(self.charts["trials"], narrow), note=note)
        if "curves" in self.charts:
            narrow = curves_chart(self._ledger.metric, self._curves, None)
            note = f"{self._ledger.metric} by epoch.{only}"
            yield section("Curves", _figures(self.charts["curves"], narrow), note=note)
        failed = [each for each in self._ordered if each.trial.error is not None]
        if failed:
            rows = [(self._name(each), cut(each.trial.error or "", _ERROR_LETTERS)) for each in failed]
            yield section("What failed", table(("trial", "why"), rows, words=(0, 1)))

    def _leaderboard(self) -> Markup:
        own = self._ledger.metric
        there = {name for each in self._ordered for name in each.last}
        metrics = [own, *(name for name in _METRICS if name in there and name != own)]
        keys = self._keys
        rows = []
        for line, each in zip(self._lines, self._ordered, strict=True):
            state = each.state
            values = [each.value(name) for name in metrics]
            numbers = ["" if value is None else f"{value:.4f}" for value in values]
            spent = (duration(state.seconds), f"{len(state.failures):,}") if state is not None else ("", "")
            status = element("span", each.status, class_=f"status {_STATUS.get(each.status, 'paused')}")
            rows.append(
                (
                    f"{line.place + 1}" if line.finished else "",
                    numbers[0],
                    *(cut(line.values[key], _NAME_LETTERS) for key in keys),
                    *numbers[1:],
                    f"{each.epoch}/{each.trial.epochs}",
                    *spent,
                    status,
                    self._name(each),
                )
            )
        names = (own, *(cut(key, _NAME_LETTERS) for key in keys), *metrics[1:])
        head = ("", *names, "epochs", "time", "failures", "state", "trial")
        words = [*range(2, len(keys) + 2), len(head) - 2, len(head) - 1]
        return table(head, rows, words)

    def _name(self, each: Reached) -> Child:
        """The trial's name, which leads to its own report if that lies there."""
        name = cut(each.trial.name, _NAME_LETTERS)
        path = self._folder.local_path
        if path is None or not (path / each.trial.name / self._run_report).is_file():
            return name
        return element("a", name, href=f"{quote(plain(each.trial.name))}/{self._run_report}")


def _figures(wide: Drawing, narrow: Drawing) -> list[Markup]:
    """Both, of which the screen shows one."""
    return [element("figure", svg(drawing), class_=kind) for kind, drawing in (("wide", wide), ("narrow", narrow))]
