"""leaderboard.png: the objective against each swept parameter, and all learning curves in one chart."""

from __future__ import annotations

from ftexp.report.png import png
from ftexp.report.sweep_charts import PANEL, curves_chart, learning_curve, trial_lines, values_chart
from ftexp.report.text import cut
from ftexp.rundir.ranking import varying
from ftexp.rundir.sweep_record import Reached, SweepRecord
from ftexp.storage.directory import Storage


def draw(directory: Storage, record: SweepRecord, ordered: list[Reached]) -> bytes:
    """Return the picture as PNG. `ordered`: best first."""
    keys = varying(record, ordered)
    trials = trial_lines(record, ordered, keys)
    curves = [(trial, learning_curve(directory, record, each)) for trial, each in zip(trials, ordered, strict=True)]
    panels = [values_chart(trials, key, record.metric) for key in keys]
    done = sum(trial.finished for trial in trials)
    title = f"{cut(record.name, 60)}: {done} of {len(trials)} trials finished"
    return png(*panels, curves_chart(record.metric, curves, PANEL), title=title)
