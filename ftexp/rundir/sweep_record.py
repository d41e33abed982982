"""sweep.json: a sweep's trials, and how each ended. Written only by the sweep's driver.

A trial's progress is in its own run.json. So the record is correct even after a SIGKILL: a trial that is recorded as
running, while no process holds the sweep, was interrupted; a trial whose run.json says finished has finished.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from typing import Any

from ftexp.errors import ConfigError
from ftexp.rundir.names import METRICS_FILE, SWEEP_FILE
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING, RunState, read_state
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage
from ftexp.storage.lease import is_held

WAITING, STOPPED = "waiting", "stopped"  # stopped early, since others are better; not a failure


@dataclass(kw_only=True)
class Trial:
    """One trial of a sweep."""

    name: str  # name of its run directory, inside the sweep's
    values: dict[str, str]  # values of the swept keys
    epochs: int
    status: str = WAITING
    error: str | None = None  # why it failed
    proposal: dict[str, str] | None = None  # {key: word} that a search proposed
    stopped_at: int | None = None  # epoch whose value led to an early stop; the trial may finish before the stop


@dataclass(kw_only=True)
class SweepRecord:
    """The content of sweep.json."""

    name: str
    metric: str  # the objective, a key of a trial's last metrics
    mode: str  # max, or min
    keys: list[str]  # all keys that were ever swept: they name the trials
    trials: list[Trial] = field(default_factory=list)
    started: float = field(default_factory=time.time)  # seconds since 1970

    def write(self, directory: Storage) -> None:
        """Write sweep.json, atomically."""
        directory.write_bytes(SWEEP_FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())

    def take_over(self, trials: list[Trial]) -> None:
        """Put `trials` first, in this order; keep the other trials of earlier invocations after them."""
        names = {trial.name for trial in trials}
        self.trials = [*trials, *(trial for trial in self.trials if trial.name not in names)]


def read_sweep_record(directory: Storage) -> SweepRecord | None:
    """Return the record of a sweep's directory; None if there is no sweep in it."""
    try:
        content = json.loads(directory.read_bytes(SWEEP_FILE))
    except FileNotFoundError:
        return None
    content["trials"] = [Trial(**trial) for trial in content["trials"]]
    return SweepRecord(**content)


@dataclass(frozen=True)
class Reached:
    """A trial and the state in its run directory."""

    trial: Trial
    status: str
    state: RunState | None  # None: it has not started

    def value(self, metric: str) -> float | None:
        """Return the latest value of a metric."""
        return self.last.get(metric)

    @property
    def last(self) -> dict[str, float]:
        """The latest value of each metric."""
        return self.state.metrics["last"] if self.state is not None else {}

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self.state.epoch if self.state is not None else 0


def look(directory: Storage) -> tuple[SweepRecord, list[Reached]]:
    """Return the current record and trials of a sweep, running or not; ConfigError if there is no sweep."""
    record = read_sweep_record(directory)
    if record is None:
        raise ConfigError(f"{directory.uri} has no {SWEEP_FILE}: give the directory of a sweep")
    is_alive = is_held(directory)
    return record, [reached(directory, trial, is_alive) for trial in record.trials]


def reached(directory: Storage, trial: Trial, is_alive: bool) -> Reached:
    """Return the current state of a trial. `is_alive`: whether the sweep's driver is running."""
    state = read_state(directory.child(trial.name))
    status = trial.status
    if not is_alive and state is not None and state.status == FINISHED and status != FAILED:
        status = FINISHED
    elif not is_alive and status == RUNNING:
        status = INTERRUPTED
    return Reached(trial, status, state)


def curve(directory: Storage, trial: Trial, metric: str) -> list[tuple[int, float]]:
    """Return (epoch, value) of every logged point that has the metric."""
    try:
        points: list[dict[str, Any]] = read_lines(directory.child(trial.name), METRICS_FILE)
    except FileNotFoundError:
        return []
    return [(point["epoch"], point[metric]) for point in points if point.get(metric) is not None]
