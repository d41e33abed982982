"""Order of a sweep's trials, and the keys in which they differ. Imports little: a report needs no more of a sweep."""

from __future__ import annotations

import math

from ftexp.rundir.state import FINISHED
from ftexp.rundir.sweep_record import STOPPED, Reached, SweepRecord


def ranked(record: SweepRecord, trials: list[Reached]) -> list[Reached]:
    """Return finished trials, best first; then those stopped early, best first; then the others in the given order."""
    sign = -1 if record.mode == "max" else 1
    groups = (FINISHED, STOPPED)

    def place(trial: Reached) -> tuple[int, float]:
        value = _number(record, trial)
        if trial.status not in groups or value is None:
            return len(groups), 0.0
        return groups.index(trial.status), sign * value

    return sorted(trials, key=place)


def has_place(record: SweepRecord, trial: Reached) -> bool:
    """Return whether a trial can be compared with others: it has finished, with a finite value."""
    return trial.status == FINISHED and _number(record, trial) is not None


def _number(record: SweepRecord, trial: Reached) -> float | None:
    value = trial.value(record.metric)
    return value if value is not None and math.isfinite(value) else None


def varying(record: SweepRecord, trials: list[Reached]) -> list[str]:
    """Return the swept keys whose values differ between these trials."""
    return [key for key in record.keys if len({trial.trial.values.get(key) for trial in trials}) > 1]
