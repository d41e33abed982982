"""The order of a sweep's trials, and in what they differ. Light: a report needs no more of a sweep."""

from __future__ import annotations

import math

from ftexp.rundir.state import FINISHED
from ftexp.rundir.sweep_record import STOPPED, Reached, SweepRecord


def ranked(record: SweepRecord, trials: list[Reached]) -> list[Reached]:
    """Finished trials, the best first; then those that were stopped early, likewise; then the others as they come."""
    sign = -1 if record.mode == "max" else 1
    groups = (FINISHED, STOPPED)

    def place(trial: Reached) -> tuple[int, float]:
        value = _number(record, trial)
        if trial.status not in groups or value is None:
            return len(groups), 0.0
        return groups.index(trial.status), sign * value

    return sorted(trials, key=place)


def has_place(record: SweepRecord, trial: Reached) -> bool:
    """Whether a trial is to be compared with others: it has finished, with a number."""
    return trial.status == FINISHED and _number(record, trial) is not None


def _number(record: SweepRecord, trial: Reached) -> float | None:
    value = trial.value(record.metric)
    return value if value is not None and math.isfinite(value) else None


def varying(record: SweepRecord, trials: list[Reached]) -> list[str]:
    """The swept keys that differ between these trials."""
    return [key for key in record.keys if len({trial.trial.values.get(key) for trial in trials}) > 1]
