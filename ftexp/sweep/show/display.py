"""What a person sees while a sweep goes on: one live table, or without a terminal a line for each change."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING
from ftexp.rundir.sweep_record import STOPPED, WAITING, Ledger, Reached, reached
from ftexp.storage.directory import Storage
from ftexp.sweep.run.runner import Job

STYLES = {
    RUNNING: "cyan",
    FINISHED: "green",
    STOPPED: "magenta",
    FAILED: "red",
    INTERRUPTED: "yellow",
    WAITING: "dim",
}


class Display:
    """Shows one sweep. Only what runs is looked up again; what has ended stays as it was."""

    def __init__(
        self,
        folder: Storage,
        ledger: Ledger,
        jobs: list[Job],
        console: Console | None = None,
        total: int | None = None,  # trials there will be; None: as many as there are jobs
    ) -> None:
        plain = console is None and not sys.stdout.isatty()
        self.console = console or Console(highlight=False, width=160 if plain else None, soft_wrap=plain)
        self._folder, self._ledger, self._jobs, self._total = folder, ledger, jobs, total
        self._known: dict[str, Reached] = {}
        self._live: Live | None = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line above the table."""
        self.console.print(text, style=style or None, markup=False, soft_wrap=True)

    @property
    def total(self) -> int:
        """How many trials there will be in all."""
        return self._total or len(self._jobs)

    def header(self, search: str | None = None) -> None:
        """What is about to run, how it is searched for, and what is done already."""
        counts = {
            status: sum(job.trial.status == status for job in self._jobs) for status in (FINISHED, STOPPED, FAILED)
        }
        done = f", {counts[FINISHED]} finished already" if counts[FINISHED] else ""
        early = f", {counts[STOPPED]} stopped early" if counts[STOPPED] else ""
        left = f", {counts[FAILED]} failed before (sweep.retry_failed=false)" if counts[FAILED] else ""
        self.say(f"sweep    {self._ledger.name}  ({self._folder.uri})")
        self.say(f"trials   {self.total} over {', '.join(self._ledger.keys) or 'nothing'}{done}{early}{left}")
        if search is not None:
            self.say(f"search   {search}")

    def changed(self, job: Job) -> None:
        """A trial's status has changed: without a terminal, this is the line that shows life."""
        seen = self._look(job)
        if self.console.is_terminal:
            self.update()
            return
        ended = sum(other.trial.status in (FINISHED, STOPPED, FAILED) for other in self._jobs)
        state = f"{seen.status:<11}" if seen.status != WAITING else "again      "
        what = seen.trial.error or self._outcome(job, seen)
        self.say(f"{ended}/{self.total} {state} {seen.trial.name}{f': {what}' if what else ''}")

    def update(self) -> None:
        """Draw the table anew."""
        if not self.console.is_terminal:
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        for job in self._jobs:
            if job.trial.status == RUNNING:
                self._look(job)
        self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _look(self, job: Job) -> Reached:
        seen = self._known[job.trial.name] = reached(self._folder, job.trial, is_alive=True)
        return seen

    def _outcome(self, job: Job, seen: Reached) -> str:
        value = seen.value(self._ledger.metric)
        if seen.status not in (FINISHED, STOPPED) or value is None:
            return ""
        if seen.status == STOPPED:
            return f"{self._ledger.metric} {value:.4f} at epoch {seen.epoch} of {job.trial.epochs}"
        return f"{self._ledger.metric} {value:.4f} after {time.monotonic() - job.began:.0f} s"

    def _table(self) -> Table:
        """As many rows as the terminal has lines: what runs, then what waits, then what is done."""
        table = Table(*self._ledger.keys, "state", "epoch", self._ledger.metric, "left", box=None, pad_edge=False)
        order = {RUNNING: 0, FAILED: 1, INTERRUPTED: 2, WAITING: 3, FINISHED: 4, STOPPED: 5}
        jobs = sorted(self._jobs, key=lambda job: order[job.trial.status])
        shown = jobs[: max(3, self.console.height - 4)]
        for job in shown:
            seen = self._known.get(job.trial.name) or self._look(job)
            value, left = seen.value(self._ledger.metric), time_left(job, seen)
            table.add_row(
                *(escape(job.trial.values.get(key, "")) for key in self._ledger.keys),
                f"[{STYLES[job.trial.status]}]{job.trial.status}",
                f"{seen.epoch}/{job.trial.epochs}",
                f"{value:.4f}" if value is not None else "",
                f"{left:.0f} s" if left is not None else "",
            )
        if len(shown) < len(jobs):
            table.add_row(f"and {len(jobs) - len(shown)} more")
        return table


def time_left(job: Job, seen: Reached) -> float | None:
    """Seconds until a running trial ends, at the pace of this call; None while that can't be told."""
    done = seen.epoch - job.began_at_epoch
    if job.trial.status != RUNNING or done <= 0:
        return None
    return (time.monotonic() - job.began) / done * (job.trial.epochs - seen.epoch)
