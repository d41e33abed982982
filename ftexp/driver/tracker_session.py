"""Link from a run's records to its trackers: points, the outcome at the end, and the printing of trackers' events."""

from __future__ import annotations

import contextlib

from ftexp.config.schema import Config
from ftexp.driver.context import RunContext
from ftexp.driver.terminal import Terminal
from ftexp.registry import load_plugins
from ftexp.rundir.names import CHECKPOINTS, METRICS_FILE
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage
from ftexp.trackers.figures import RunFigures
from ftexp.trackers.follower import described
from ftexp.trackers.registry import Outcome
from ftexp.trackers.registry import trackers as registered
from ftexp.trackers.run import Trackers, read_complete, shown, tracked_run
from ftexp.wire.events import TrackerFailed


def trackers_of(config: Config, record: RunRecord, sweep: Storage | None) -> Trackers:
    """Return the trackers of a run that is about to train. sweep: directory of the sweep that the run is a trial of."""
    run_dir, state = record.storage, record.state
    run = None
    if config.tracker.names:
        figures = RunFigures(record, config.model.name, config.data.name, shown(run_dir))
        run = tracked_run(config, run_dir, state.name, state.started, sweep, figures=figures)
    trackers = Trackers(config.tracker, run, run_dir, record.metrics.points)
    record.metrics.on_point = trackers.offer
    return trackers


def outcome_of(state: RunState, run_dir: Storage) -> Outcome:
    """Return a run's outcome at the end of an invocation."""
    directory, best_step = run_dir.child(CHECKPOINTS), state.metrics["best"].get("step")
    names = {"checkpoint": state.checkpoint}
    if best_step is not None:
        with contextlib.suppress(OSError):  # the store is down; the checkpoint may still exist
            found = [name for name in directory.list_directories() if name.startswith(f"step_{best_step:08d}.")]
            names["best_checkpoint"] = found[-1] if found else None
    counted = {
        "attempts": state.attempts,
        "failures": len(state.failures),
        "goodput": state.goodput,
        "step": state.step,
    }
    return Outcome(
        status=state.status,
        tags={
            **{key: shown(directory.child(name)) for key, name in names.items() if name is not None},
            **{key: str(value) for key, value in counted.items() if value is not None},
        },
        metrics={name: value for name, value in state.metrics["last"].items() if value is not None},
    )


def close_trackers(trackers: Trackers, record: RunRecord, terminal: Terminal) -> None:
    """Wait for the trackers, print and record their last events. Never fails the run.

    To be called after `Trackers.end`, once the records are closed.
    """
    for event in trackers.wait():
        terminal.say(described(event), "yellow" if isinstance(event, TrackerFailed) else "")
        with contextlib.suppress(OSError):
            record.late_event(event)


def deliver_late(context: RunContext, terminal: Terminal) -> None:
    """Deliver a finished run to trackers that lack part of it, because they were down or are new."""
    config, run_dir, state = context.config, context.run_dir, context.state
    late = [name for name in config.tracker.names if name not in read_complete(run_dir)]
    if late:
        load_plugins(config.plugins)
    late = [name for name in late if registered.get(name).keeps]
    if not late:
        return
    run = tracked_run(config, run_dir, state.name, state.started)
    trackers = Trackers(config.tracker, run, run_dir, lambda: read_lines(run_dir, METRICS_FILE), late)
    trackers.start(lambda event: terminal.say(described(event)))
    trackers.end(outcome_of(state, run_dir))
    for failure in trackers.wait():
        terminal.say(described(failure), "yellow")
