"""Display of a running sweep: a live table; without a terminal, a line for each change."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ftexp.cli.wrapping import say
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING
from ftexp.rundir.sweep_record import STOPPED, WAITING, Reached, SweepRecord, reached
from ftexp.storage.directory import Storage

if TYPE_CHECKING:
    from ftexp.sweep.run.runner import TrialProcess  # only for annotations

STYLES = {
    RUNNING: "cyan",
    FINISHED: "green",
    STOPPED: "magenta",
    FAILED: "red",
    INTERRUPTED: "yellow",
    WAITING: "dim",
}


class Display:
    """Display of one sweep. Only running trials are read again; the state of ended ones is kept."""

    def __init__(
        self,
        directory: Storage,
        record: SweepRecord,
        processes: list[TrialProcess],
        total: int,  # number of trials, including those yet to be proposed
        console: Console | None = None,
    ) -> None:
        plain = console is None and not sys.stdout.isatty()
        self.console = console or Console(highlight=False, width=160 if plain else None, soft_wrap=plain)
        self._directory, self._record, self._processes, self._total = directory, record, processes, total
        self._known: dict[str, Reached] = {}
        self._live: Live | None = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the table."""
        say(self.console, text, style)

    def header(self, search: str | None) -> None:
        """Print the sweep's trials and search, and the number of trials that have ended."""
        counts = {
            status: sum(process.trial.status == status for process in self._processes)
            for status in (FINISHED, STOPPED, FAILED)
        }
        done = f", {counts[FINISHED]} finished already" if counts[FINISHED] else ""
        early = f", {counts[STOPPED]} stopped early" if counts[STOPPED] else ""
        left = f", {counts[FAILED]} failed before (sweep.retry_failed=false)" if counts[FAILED] else ""
        self.say(f"sweep    {self._record.name}  ({self._directory.uri})")
        self.say(f"trials   {self._total} over {', '.join(self._record.keys) or 'nothing'}{done}{early}{left}")
        if search is not None:
            self.say(f"search   {search}")

    def changed(self, process: TrialProcess) -> None:
        """Show that a trial's status has changed: redraw the table, or print a line without a terminal."""
        seen = self._look(process)
        if self.console.is_terminal:
            self.update()
            return
        ended = sum(other.trial.status in (FINISHED, STOPPED, FAILED) for other in self._processes)
        state = f"{seen.status:<11}" if seen.status != WAITING else "again      "
        what = seen.trial.error or self._outcome(process, seen)
        self.say(f"{ended}/{self._total} {state} {seen.trial.name}{f': {what}' if what else ''}")

    def update(self) -> None:
        """Redraw the table."""
        if not self.console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        for process in self._processes:
            if process.trial.status == RUNNING:
                self._look(process)
        self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Remove the table."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _look(self, process: TrialProcess) -> Reached:
        seen = self._known[process.trial.name] = reached(self._directory, process.trial, is_alive=True)
        return seen

    def _outcome(self, process: TrialProcess, seen: Reached) -> str:
        value = seen.value(self._record.metric)
        if seen.status not in (FINISHED, STOPPED) or value is None:
            return ""
        if seen.status == STOPPED:
            return f"{self._record.metric} {value:.4f} at epoch {seen.epoch} of {process.trial.epochs}"
        return f"{self._record.metric} {value:.4f} after {time.monotonic() - process.began:.0f} s"

    def _table(self) -> Table:
        """Return a table that fits the terminal's height: running trials first, ended ones last."""
        table = Table(*self._record.keys, "state", "epoch", self._record.metric, "left", box=None, pad_edge=False)
        order = {RUNNING: 0, FAILED: 1, INTERRUPTED: 2, WAITING: 3, FINISHED: 4, STOPPED: 5}
        processes = sorted(self._processes, key=lambda process: order[process.trial.status])
        shown = processes[: max(3, self.console.height - 4)]
        for process in shown:
            seen = self._known.get(process.trial.name) or self._look(process)
            value, left = seen.value(self._record.metric), time_left(process, seen)
            table.add_row(
                *(escape(process.trial.values.get(key, "")) for key in self._record.keys),
                f"[{STYLES[process.trial.status]}]{process.trial.status}",
                f"{seen.epoch}/{process.trial.epochs}",
                f"{value:.4f}" if value is not None else "",
                f"{left:.0f} s" if left is not None else "",
            )
        if len(shown) < len(processes):
            table.add_row(f"and {len(processes) - len(shown)} more")
        return table


def time_left(process: TrialProcess, seen: Reached) -> float | None:
    """Return seconds until a running trial ends, at the pace of this invocation; None while it is unknown."""
    done = seen.epoch - process.began_at_epoch
    if process.trial.status != RUNNING or done <= 0:
        return None
    return (time.monotonic() - process.began) / done * (process.trial.epochs - seen.epoch)
