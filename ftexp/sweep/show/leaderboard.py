"""The leaderboard of a sweep: a table, leaderboard.csv, leaderboard.png. Only keys that vary get a column."""

from __future__ import annotations

import csv
import io

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ftexp.rundir.names import LEADERBOARD_CSV_FILE, LEADERBOARD_PNG_FILE
from ftexp.rundir.ranking import ranked, varying
from ftexp.rundir.state import FINISHED
from ftexp.rundir.sweep_record import Reached, SweepRecord
from ftexp.storage.directory import Storage
from ftexp.sweep.show.display import STYLES
from ftexp.sweep.show.picture import draw

_UNLIMITED = 10_000  # terminal width at which no table is wrapped


def publish(directory: Storage, record: SweepRecord, trials: list[Reached], console: Console) -> None:
    """Print the table, and write both files into the sweep's directory."""
    ordered = ranked(record, trials)
    console.print(table(record, ordered, console))
    directory.write_bytes(LEADERBOARD_CSV_FILE, as_csv(record, ordered).encode())
    if any(trial.status == FINISHED and trial.value(record.metric) is not None for trial in ordered):
        directory.write_bytes(LEADERBOARD_PNG_FILE, draw(directory, record, ordered))


def table(record: SweepRecord, ordered: list[Reached], console: Console) -> Table:
    """Return the leaderboard for a terminal."""
    keys = varying(record, ordered) or record.keys
    extra = [
        name
        for name in ("val_loss", "test_accuracy")
        if name != record.metric and any(each.value(name) is not None for each in ordered)
    ]
    drawn = Table("", *keys, record.metric, *extra, "epochs", "time", "failures", "state", box=None, pad_edge=False)
    for column in drawn.columns:
        column.overflow = "fold"  # so that a narrow terminal shows every name and value in full
    drawn.columns[-1].no_wrap = True
    for place, each in enumerate(ordered, start=1):
        numbers = [each.value(name) for name in (record.metric, *extra)]
        state = each.state
        drawn.add_row(
            str(place) if each.status == FINISHED else "",
            *(escape(each.trial.values.get(key, "")) for key in keys),
            *(f"{number:.4f}" if number is not None else "" for number in numbers),
            f"{each.epoch}/{each.trial.epochs}",
            f"{state.seconds:.0f} s" if state is not None else "",
            str(len(state.failures)) if state is not None else "",
            f"[{STYLES[each.status]}]{each.status}",
        )
    if console.measure(drawn, options=console.options.update(width=_UNLIMITED)).maximum > console.width:
        for column in drawn.columns:  # wrap headers between words: val_ above accuracy
            column.header = str(column.header).replace("_", "_\n")
    return drawn


def as_csv(record: SweepRecord, ordered: list[Reached]) -> str:
    """Return the leaderboard as CSV, with every metric, one line per trial."""
    keys = varying(record, ordered) or record.keys
    metrics = sorted({name for each in ordered for name in each.last} - {record.metric})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *keys, "state", record.metric, *metrics, "epochs", "steps", "seconds", "failures"])
    for each in ordered:
        state = each.state
        values = [each.trial.values.get(key, "") for key in keys]
        numbers = [each.last.get(name, "") for name in (record.metric, *metrics)]
        spent = [state.epoch, state.step, round(state.seconds, 1), len(state.failures)] if state else [0, 0, 0, 0]
        writer.writerow([each.trial.name, *values, each.status, *numbers, *spent])
    return text.getvalue()
