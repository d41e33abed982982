"""leaderboard.png: the objective against each swept parameter, and the learning curves laid over each other."""

from __future__ import annotations

from ftexp.report.png import png
from ftexp.report.sweep_charts import PANEL, curves_chart, learning_curve, trial_lines, values_chart
from ftexp.report.text import cut
from ftexp.rundir.ranking import varying
from ftexp.rundir.sweep_record import Ledger, Reached
from ftexp.storage.directory import Storage


def draw(folder: Storage, ledger: Ledger, ordered: list[Reached]) -> bytes:
    """The picture as PNG; `ordered`: the best first."""
    keys = varying(ledger, ordered)
    trials = trial_lines(ledger, ordered, keys)
    curves = [(trial, learning_curve(folder, ledger, each)) for trial, each in zip(trials, ordered, strict=True)]
    panels = [values_chart(trials, key, ledger.metric) for key in keys]
    done = sum(trial.finished for trial in trials)
    title = f"{cut(ledger.name, 60)}: {done} of {len(trials)} trials finished"
    return png(*panels, curves_chart(ledger.metric, curves, PANEL), title=title)
