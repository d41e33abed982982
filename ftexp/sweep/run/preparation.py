"""Preparation of a sweep: claim its directory, read its record, mark finished trials."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ftexp.cluster.hot_start.driver import HotStart, imports_of
from ftexp.cluster.ray_cluster import prepare_environment
from ftexp.cluster.resources import Workers
from ftexp.config.fingerprint import as_begun
from ftexp.config.schema import Config
from ftexp.driver.resume import open_run, preprocessing_as_begun, recorded, require_resumable
from ftexp.errors import ConfigError
from ftexp.rundir.state import FAILED, FINISHED
from ftexp.rundir.sweep_record import STOPPED, WAITING, SweepRecord, Trial, read_sweep_record
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease, unused_name
from ftexp.sweep.run.identity import trial_name
from ftexp.sweep.run.proposer import Proposer
from ftexp.sweep.run.runner import TrialProcess, max_threads

SWEEPS = "sweeps"  # the directory under run.storage


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[Storage]:
    """Claim the sweep's directory for this invocation."""
    directory = Storage.at(config.run.storage, SWEEPS, config.sweep.name or unused_name())
    directory.require_writable()
    lease = Lease.take(directory, key="sweep.name")
    try:
        yield directory
    finally:
        lease.release()


def open_record(directory: Storage, config: Config, keys: Callable[[list[str]], list[str]]) -> SweepRecord:
    """Return the sweep's record, or a new one, with the keys and the objective of this invocation.

    keys: maps the keys that were swept before to the keys that name trials now.
    """
    checkpoint, sweep = config.checkpoint, config.sweep
    before = read_sweep_record(directory)
    now = keys(before.keys if before is not None else [])
    metric = sweep.metric or checkpoint.checkpoint_score_attribute
    mode = sweep.mode or checkpoint.checkpoint_score_order
    if before is None:
        return SweepRecord(name=directory.name, metric=metric, mode=mode, keys=now)
    before.keys, before.metric, before.mode = now, metric, mode
    return before


def make_process(
    directory: Storage, keys: list[str], config: Config, values: dict[str, str], words: list[str], workers: Workers
) -> TrialProcess:
    """Return a waiting trial, with a run directory of its name."""
    name = trial_name(values, keys)
    own = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name, storage=directory.uri))
    trial = Trial(name=name, values={key: values[key] for key in keys if key in values}, epochs=config.train.epochs)
    return TrialProcess(trial, own, words, workers, directory.child(name))


def mark_what_is_done(
    directory: Storage,
    processes: list[TrialProcess],
    retry_failed: bool,
    record: SweepRecord,
    keeps_stopped: bool = False,
) -> None:
    """Set each trial's status from its run directory; one ConfigError if the config keys that define trials changed.

    keeps_stopped: whether trials that were stopped early stay stopped; a grid resumes them.
    """
    before = {trial.name: trial for trial in record.trials}
    changed: dict[str, None] = {}
    for process in processes:
        trial = process.trial
        require_resumable(process.config, process.run_dir)
        try:
            state = open_run(_as_begun(process), process.run_dir, trial.name)
        except ConfigError as error:
            changed |= dict.fromkeys(str(error).splitlines()[1:])
            continue
        known = before.get(trial.name)
        if state.status == FINISHED:
            trial.status, trial.stopped_at = FINISHED, known.stopped_at if known is not None else None
        elif known is not None and known.status == FAILED and not retry_failed:
            trial.status, trial.error = FAILED, known.error
        elif known is not None and known.stopped_at is not None and keeps_stopped and state.attempts:
            trial.status, trial.stopped_at = STOPPED, known.stopped_at
    if changed:
        title = (
            f"{directory.uri} holds trials with a different configuration; choose another sweep.name, or restore these "
            "values:"
        )
        raise ConfigError("\n".join([title, *changed]))
    names = [process.trial.name for process in processes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("\n".join(["identical trials; give each value once:", *twice]))


def _as_begun(process: TrialProcess) -> Config:
    """Return the config as the trial itself builds it: with the preprocessing and decoding of its first start."""
    config, overrides, run_dir = process.config, process.overrides, process.run_dir
    if config.model.pretrained is not False:
        config = preprocessing_as_begun(config, overrides, run_dir) or config
    config, _ = as_begun(config, recorded(run_dir), overrides)
    return config


def run_proposed(
    directory: Storage, record: SweepRecord, proposer: Proposer, share: int, config: Config
) -> list[float | None]:
    """Run the unfinished trials of a sweep whose directory is claimed; return the objective of each trial.

    share: number of trials that may share a machine. config: the config of any trial.
    """
    record.take_over([process.trial for process in proposer.processes])
    prepare_environment(config)
    is_needed = proposer.has_more or any(process.trial.status == WAITING for process in proposer.processes)
    with _preloading(proposer.probes, is_needed) as hot_start:
        # late, since it imports Ray: after Ray's environment is set, and in parallel with the preloaded process
        from ftexp.sweep.run.on_ray import run_trials

        return run_trials(directory, record, proposer, share, hot_start)


@contextlib.contextmanager
def _preloading(probes: Sequence[TrialProcess], is_needed: bool) -> Iterator[HotStart | None]:
    """Start a preloaded process, from which drivers and workers are forked, if it is needed."""
    if not is_needed:
        yield None
        return
    config = probes[0].config
    hot_start = HotStart(config.scaling, max_threads(probes), joins=False, imports=imports_of(config))
    try:
        yield hot_start
    finally:
        hot_start.stop()
