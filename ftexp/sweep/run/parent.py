"""A sweep as a run of its own in trackers that group runs this way: its trials are child runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ftexp.config.schema import Config
from ftexp.registry import load_plugins
from ftexp.rundir.ranking import ranked
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED
from ftexp.rundir.sweep_record import SweepRecord, reached
from ftexp.storage.directory import Storage
from ftexp.sweep.show.display import Display
from ftexp.trackers.follower import described
from ftexp.trackers.registry import Outcome, trackers
from ftexp.trackers.run import Trackers, check_names, shown, tracked_run


@contextlib.contextmanager
def tracked_sweep(config: Config, directory: Storage, record: SweepRecord, display: Display) -> Iterator[None]:
    """Log the sweep of this block to the trackers. The trials log themselves.

    UnknownNameError if a tracker isn't registered.
    """
    names = config.tracker.names
    if not names:
        yield
        return
    load_plugins(config.plugins)
    check_names(names)
    params = {"trials over": ", ".join(record.keys), "metric": record.metric, "mode": record.mode}
    run = tracked_run(config, directory, record.name, record.started, params=params)
    parents = Trackers(
        config.tracker, run, directory, lambda: (), [name for name in names if trackers.get(name).has_parents]
    )
    parents.start(lambda event: display.say(described(event)))
    status = FAILED
    try:
        yield
        status = FINISHED
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    finally:
        parents.end(_outcome(directory, record, status))
        for failure in parents.wait():
            display.say(described(failure), "yellow")


def _outcome(directory: Storage, record: SweepRecord, status: str) -> Outcome:
    found = [reached(directory, trial, is_alive=True) for trial in record.trials]
    tags = {"trials": str(len(found)), "finished": str(sum(each.status == FINISHED for each in found))}
    best = next(iter(ranked(record, found)), None)
    if best is not None and (value := best.value(record.metric)) is not None:
        tags |= {"best_trial": best.trial.name, f"best.{record.metric}": str(value)}
        tags["best_run"] = shown(directory.child(best.trial.name))
    return Outcome(status=status, tags=tags)
