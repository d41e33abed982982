"""One call of a sweep once its configs are good: what is done already, Ray up, trials, leaderboard, Ray down."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from ftexp.cluster.hot_start.driver import HotStart
from ftexp.cluster.ray_cluster import prepare_environment
from ftexp.cluster.resources import Workers, decide_workers, num_shares
from ftexp.config.schema import Config
from ftexp.driver.resume import open_run, require_resumable
from ftexp.errors import ConfigError, SweepFailedError
from ftexp.rundir.record import FAILED, FINISHED
from ftexp.rundir.sweep_record import STOPPED, WAITING, Ledger, Trial, read_ledger
from ftexp.storage.directory import Storage
from ftexp.storage.lease import Lease, unused_name
from ftexp.sweep.run.identity import swept_keys, trial_name
from ftexp.sweep.run.runner import Job

SWEEPS = "sweeps"  # the folder under run.storage


def run_sweep(configs: Sequence[Config], jobs: Sequence[dict[str, str]], words: list[list[str]]) -> list[float | None]:
    """Run what is not done yet; the objective of each job, in order, None where there is none.

    Args:
        configs: one for each job; `sweep` is the same in all.
        jobs: {key: value} of each job's overrides.
        words: the overrides as typed, for overrides.yaml.

    Raises:
        ConfigError: the sweep began with another config, or a trial can never fit; nothing was started.
        SweepFailedError: some trials failed; the others are done.
        SystemExit: a signal stopped the sweep.
    """
    share = num_shares(configs, configs[0].sweep.max_concurrent)
    workers = [decide_workers(config.scaling, share=share) for config in configs]
    with claimed(configs[0]) as folder:
        ledger = open_ledger(folder, configs[0], lambda before: swept_keys(jobs, before))
        planned = [make_job(folder, ledger.keys, *each) for each in zip(configs, jobs, words, workers, strict=True)]
        mark_what_is_done(folder, planned, configs[0].sweep.retry_failed, ledger)
        ledger.take_over([job.trial for job in planned])
        prepare_environment(configs[0])
        with preloading(planned, any(job.trial.status == WAITING for job in planned)) as hot_start:
            from ftexp.sweep.run.session import run_trials

            return run_trials(folder, ledger, planned, share, hot_start)


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[Storage]:
    """The sweep's directory, which no other command has meanwhile."""
    folder = Storage.at(config.run.storage, SWEEPS, config.sweep.name or unused_name())
    folder.require_writable()
    lease = Lease.take(folder, key="sweep.name")
    try:
        yield folder
    finally:
        lease.release()


@contextlib.contextmanager
def preloading(jobs: list[Job], is_needed: bool) -> Iterator[HotStart | None]:
    """A process that has everything imported, from which others are forked, beside what Ray imports here."""
    if not is_needed:
        yield None
        return
    hot_start = HotStart(jobs[0].config.scaling, most_threads(jobs), joins=False)
    try:
        yield hot_start
    finally:
        hot_start.stop()


def most_threads(jobs: Sequence[Job]) -> int:
    """Of a worker of any trial: what is preloaded serves them all."""
    return max(job.workers.num_threads for job in jobs)


def open_ledger(folder: Storage, config: Config, keys: Callable[[list[str]], list[str]]) -> Ledger:
    """The sweep's ledger, or a new one, with the keys that this call sweeps and its objective.

    keys: of what was swept before, those that name trials now.
    """
    checkpoint, sweep = config.checkpoint, config.sweep
    before = read_ledger(folder)
    now = keys(before.keys if before is not None else [])
    metric = sweep.metric or checkpoint.checkpoint_score_attribute
    mode = sweep.mode or checkpoint.checkpoint_score_order
    if before is None:
        return Ledger(name=folder.name, metric=metric, mode=mode, keys=now)
    before.keys, before.metric, before.mode = now, metric, mode
    return before


def make_job(
    folder: Storage, keys: list[str], config: Config, job: dict[str, str], words: list[str], workers: Workers
) -> Job:
    """A trial that waits, in a run directory of its name."""
    name = trial_name(job, keys)
    own = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name, storage=folder.uri))
    trial = Trial(name=name, values={key: job[key] for key in keys if key in job}, epochs=config.train.epochs)
    return Job(trial, own, words, workers, folder.child(name))


def mark_what_is_done(
    folder: Storage, jobs: list[Job], retry_failed: bool, ledger: Ledger, keeps_stopped: bool = False
) -> None:
    """Set each trial's status by its run directory; ConfigError, once, if what defines the trials has changed.

    keeps_stopped: whether what was stopped early stays so; a grid has it go on.
    """
    before = {trial.name: trial for trial in ledger.trials}
    changed: dict[str, None] = {}
    for job in jobs:
        trial = job.trial
        require_resumable(job.config, job.run_dir)
        try:
            state = open_run(job.config, job.run_dir, trial.name)
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
        title = f"{folder.uri} holds trials that are defined otherwise; choose another sweep.name, or put these back:"
        raise ConfigError("\n".join([title, *changed]))
    names = [job.trial.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError("\n".join(["trials that are the same; give each value once:", *twice]))


def failures_of(jobs: Sequence[Job]) -> SweepFailedError | None:
    """What failed of these and why, in a line each; None if nothing did."""
    failed = [job.trial for job in jobs if job.trial.status == FAILED]
    if not failed:
        return None
    title = f"{len(failed)} of {len(jobs)} trials failed:"
    return SweepFailedError("\n".join([title, *(f"{trial.name}: {trial.error}" for trial in failed)]))
