"""A sweep whose trials are proposed one by one, by what those before have shown.

Everything that a search knows is in the ledger and in the run directories. Population based training isn't offered: it
changes a trial's hyper-parameters half-way and has it go on from another's checkpoint. Here a run *is* its
hyper-parameters: they name it, its fingerprint refuses to go on with others, and its config.yaml makes it again to the
bit. A schedule of them that came about by chance would be none of this; so a checkpoint's optimiser and position are
never another run's, and `resume_from` takes weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftexp.cluster.ray_cluster import prepare_environment
from ftexp.cluster.resources import decide_workers, num_shares
from ftexp.config.schema import Config, SearchConfig
from ftexp.errors import ConfigError, SweepFailedError
from ftexp.rundir.record import FAILED, FINISHED, INTERRUPTED, RUNNING, read_state
from ftexp.rundir.sweep_record import STOPPED, WAITING, Ledger, curve
from ftexp.storage.directory import Storage
from ftexp.sweep.run.runner import Job
from ftexp.sweep.run.sweep import claimed, make_job, mark_what_is_done, open_ledger, preloading
from ftexp.sweep.search.proposing import Known, propose
from ftexp.sweep.search.space import Dimension, inside, num_points, plain_key

if TYPE_CHECKING:
    from ftexp.sweep.search.halving import Halving


@dataclass(frozen=True)
class Plan:
    """What a search is, once the command is known to be good."""

    settings: SearchConfig
    space: list[Dimension]
    fixed: list[str]  # words that all trials share
    probes: list[Config]  # configs that between them have every option, and both ends of every interval
    compose: Callable[[list[str]], tuple[Config, dict[str, str]]]  # a trial's words: its config, {key: value}

    @property
    def keys(self) -> list[str]:
        """What trials are named by."""
        return [plain_key(dimension) for dimension in self.space]

    @property
    def num_trials(self) -> int:
        """How many there will be in all: no more than the space has points."""
        return min(self.settings.num_trials, num_points(self.space) or self.settings.num_trials)

    def describe(self) -> str:
        """The search in a line."""
        settings = self.settings
        text = f"{settings.search}, seed {settings.seed}"
        if self.num_trials < settings.num_trials:
            text += f"; the space has {self.num_trials} points only"
        if settings.scheduler == "asha":
            text += f"; asha: of {settings.reduction_factor:g} trials about 1 goes on beyond epoch "
            text += ", ".join(f"{epoch:g}" for epoch in self._rungs())
        return text

    def _rungs(self) -> Iterator[float]:
        epoch = float(self.settings.grace_epochs)
        while epoch < self.probes[0].train.epochs:
            yield epoch
            epoch *= self.settings.reduction_factor


class Search:
    """Gives a sweep its next trial, and tells which are to be stopped.

    `jobs` are the trials that were proposed, in that order; whoever takes another from `next_job` puts it there.
    """

    def __init__(self, folder: Storage, ledger: Ledger, plan: Plan, share: int) -> None:
        self.plan = plan
        self._folder, self._ledger, self._share = folder, ledger, share
        self._ended: dict[str, Known] = {}
        self._halving: Halving | None = None
        self._whole: set[str] = set()  # trials that have ended, and all of whose points the halving has
        # trials that have finished since early stopping was asked about them for the last time
        self._undecided = {trial.name for trial in ledger.trials if trial.status == RUNNING}
        self._without: str | None = None  # a trial that has finished, and has no objective
        self._is_exhausted = False  # nothing new can be drawn from the space
        self.probes = [self._job_of(config, {}) for config in plan.probes]
        self.jobs: list[Job] = []
        for trial in ledger.trials:
            if trial.proposal is not None and inside(plan.space, trial.proposal):
                self.jobs.append(self._job(trial.proposal))
        mark_what_is_done(folder, self.jobs, plan.probes[0].sweep.retry_failed, ledger, keeps_stopped=True)

    @property
    def has_more(self) -> bool:
        """Whether there are trials yet to be proposed."""
        return len(self.jobs) < self.plan.num_trials and not self._is_exhausted

    @property
    def least(self) -> dict[str, float]:
        """What a trial takes of the cluster at the least."""
        needs = [probe.needs for probe in self.probes]
        return {name: min(each.get(name, 0) for each in needs) for name in needs[0]}

    def begin(self) -> None:
        """Rebuild what early stopping knows; it may find that a trial that was broken off need not go on."""
        settings = self.plan.settings
        if settings.scheduler == "none":
            return
        epochs = self.plan.probes[0].train.epochs
        from ftexp.sweep.search.halving import Halving

        self._halving = Halving(self._ledger.mode, settings.grace_epochs, settings.reduction_factor, epochs)
        self._take_what_has_ended(self._halving)
        for job in self.jobs:
            if job.trial.status == WAITING:
                epoch = self._halving.decide(job.trial.name, self._curve(job))
                job.trial.status, job.trial.stopped_at = (WAITING, None) if epoch is None else (STOPPED, epoch)

    def next_job(self) -> Job | None:
        """The next trial, noted in the ledger before it begins; None if there is none."""
        known = [self._known(job) for job in self.jobs]
        if not self.has_more or self._without is not None:
            return None
        settings = self.plan.settings
        mode = self._ledger.mode
        words = propose(self.plan.space, settings.search, mode, settings.seed, len(self.jobs), known)
        if words is None:
            self._is_exhausted = True
            return None
        job = self._job(words)
        try:
            mark_what_is_done(self._folder, [job], retry_failed=True, ledger=self._ledger)
        except ConfigError as error:  # an earlier sweep's trial of that name
            job.trial.status, job.trial.error = FAILED, str(error)
        self._undecided.add(job.trial.name)
        others = [trial for trial in self._ledger.trials if trial.name != job.trial.name]
        self._ledger.trials = [*others, job.trial]
        self._ledger.write(self._folder)
        return job

    def settle(self) -> None:
        """Have early stopping take what has ended; before the ledger says that it has."""
        if self._halving is not None:
            self._take_what_has_ended(self._halving)

    def to_stop(self) -> list[tuple[Job, int]]:
        """Trials that run and are to be stopped, each with the epoch whose value decides it."""
        halving = self._halving
        if halving is None:
            return []
        self.settle()
        running = [job for job in self.jobs if job.process is not None and job.trial.stopped_at is None]
        decided = [(job, halving.decide(job.trial.name, self._curve(job))) for job in running]
        return [(job, epoch) for job, epoch in decided if epoch is not None]

    def problem(self) -> str | None:
        """Why there is nothing to search by, if there isn't."""
        for job in self.jobs:
            self._known(job)
        if self._without is None:
            return None
        return (
            f"{self._without} has finished without {self._ledger.metric}, which the search goes by: set sweep.metric "
            "to one that its metrics.jsonl has"
        )

    def _take_what_has_ended(self, halving: Halving) -> None:
        for job in self.jobs:
            trial = job.trial
            if trial.status not in (FINISHED, STOPPED, FAILED) or trial.name in self._whole:
                continue
            if trial.status == FINISHED and trial.name in self._undecided and trial.stopped_at is None:
                # it was too quick to be stopped; what the search makes of it mustn't depend on that
                trial.stopped_at = halving.decide(trial.name, self._curve(job))
            else:
                halving.take(trial.name, self._curve(job))
            self._whole.add(trial.name)

    def _curve(self, job: Job) -> list[tuple[int, float]]:
        """(epoch, objective) points, up to the one that had the trial stopped."""
        points = curve(self._folder, job.trial, self._ledger.metric)
        last = job.trial.stopped_at
        return points if last is None else [(epoch, value) for epoch, value in points if epoch <= last]

    def _known(self, job: Job) -> Known:
        trial = job.trial
        assert trial.proposal is not None
        if trial.status in (WAITING, RUNNING, INTERRUPTED):
            return Known(trial.proposal, RUNNING)
        if trial.name not in self._ended:
            self._ended[trial.name] = self._outcome(job, trial.proposal)
        return self._ended[trial.name]

    def _outcome(self, job: Job, words: dict[str, str]) -> Known:
        """What an ended trial has shown. One that diverged is as bad as can be; one that crashed has shown nothing."""
        trial, state, metric = job.trial, read_state(job.run_dir), self._ledger.metric
        if trial.stopped_at is not None:
            return Known(words, STOPPED, curve=[value for _, value in self._curve(job)])
        if state is None or trial.status == FAILED:
            diverged = state is not None and bool(state.failures) and state.failures[-1].cause == "non_finite"
            return Known(words, STOPPED if diverged else FAILED)
        if metric not in state.metrics["last"]:
            self._without = trial.name
            return Known(words, FAILED)
        value = state.metrics["last"][metric]
        return Known(words, FINISHED, value) if _is_finite(value) else Known(words, STOPPED)

    def _job(self, words: dict[str, str]) -> Job:
        """The trial of a proposal; one whose config is wrong has failed already."""
        typed = [*self.plan.fixed, *(f"{each.key}={words[plain_key(each)]}" for each in self.plan.space)]
        try:
            config, values = self.plan.compose(typed)
            job = self._job_of(config, values, typed)
        except ConfigError as error:
            job = self._job_of(self.plan.probes[0], words, typed)
            job.trial.status, job.trial.error = FAILED, str(error).replace("\n", "; ")
        job.trial.proposal = words
        return job

    def _job_of(self, config: Config, values: dict[str, str], words: Sequence[str] = ()) -> Job:
        workers = decide_workers(config.scaling, share=self._share)
        return make_job(self._folder, self._ledger.keys, config, values, list(words), workers)


def _is_finite(value: float | None) -> bool:  # a record has null for NaN
    return value is not None and math.isfinite(value)


def run_search(plan: Plan) -> None:
    """Run the trials of a search that aren't done yet, and show which was best.

    Raises:
        ConfigError: the sweep began with another config, or a trial can never fit; nothing was started.
        SweepFailedError: some trials failed, or there is no objective to search by.
        SystemExit: a signal stopped the sweep.
    """
    config = plan.probes[0]
    share = num_shares([config] * plan.num_trials, config.sweep.max_concurrent)
    with claimed(config) as folder:
        ledger = open_ledger(folder, config, lambda _: plan.keys)
        search = Search(folder, ledger, plan, share)
        ledger.take_over([job.trial for job in search.jobs])
        prepare_environment(config)
        waits = any(job.trial.status == WAITING for job in search.jobs)
        with preloading(search.probes, waits or search.has_more) as hot_start:
            from ftexp.sweep.run.session import run_trials

            run_trials(folder, ledger, search.jobs, share, hot_start, search)
            if (problem := search.problem()) is not None:
                raise SweepFailedError(problem)
