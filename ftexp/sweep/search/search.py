"""A search: a sweep whose trials are proposed one by one, from the results of earlier ones.

A search's whole state is in the sweep record and in the run directories. Population based training isn't offered: it
changes a trial's hyper-parameters during training and resumes it from another trial's checkpoint. Here a run *is* its
hyper-parameters: they name it, its fingerprint refuses to continue with others, and its config.yaml reproduces it
bitwise. A schedule that arises by chance would break all three. So a checkpoint's optimiser and position are never used
for another run, and `resume_from` loads only weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ftexp.cluster.resources import decide_workers, num_shares, spare_of
from ftexp.config.schema import Config, SearchConfig
from ftexp.errors import ConfigError, SweepFailedError
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING, read_state
from ftexp.rundir.sweep_record import STOPPED, WAITING, SweepRecord, curve
from ftexp.storage.directory import Storage
from ftexp.sweep.run.preparation import claimed, make_process, mark_what_is_done, open_record, run_proposed
from ftexp.sweep.run.runner import TrialProcess
from ftexp.sweep.search.halving import Halving, rungs
from ftexp.sweep.search.proposing import Known, propose
from ftexp.sweep.search.space import Dimension, inside, num_points, plain_key


@dataclass(frozen=True)
class SearchSetup:
    """A search whose command has been validated."""

    settings: SearchConfig
    space: list[Dimension]
    fixed: list[str]  # overrides that all trials share
    probes: list[Config]  # configs that together have every option, and both ends of every interval
    compose: Callable[[list[str]], tuple[Config, dict[str, str]]]  # overrides of a trial -> its config and {key: value}

    @property
    def keys(self) -> list[str]:
        """Keys that trials are named by."""
        return [plain_key(dimension) for dimension in self.space]

    @property
    def num_trials(self) -> int:
        """Total number of trials: at most the number of points in the space."""
        return min(self.settings.num_trials, num_points(self.space) or self.settings.num_trials)

    @property
    def epochs(self) -> int:
        """Epochs of each trial; if early stopping compares trials, all have the same."""
        return self.probes[0].train.epochs

    def describe(self) -> str:
        """Describe the search in one line."""
        settings = self.settings
        text = f"{settings.search}, seed {settings.seed}"
        if self.num_trials < settings.num_trials:
            text += f"; the space has {self.num_trials} points only"
        if settings.scheduler == "asha":
            compared = rungs(settings.grace_epochs, settings.reduction_factor, self.epochs)
            text += f"; asha: about 1 of {settings.reduction_factor:g} trials continues beyond epoch "
            text += ", ".join(f"{epoch:g}" for epoch in compared)
        return text


class Search:
    """A `Proposer` that uses the results of earlier trials."""

    def __init__(self, directory: Storage, record: SweepRecord, setup: SearchSetup, share: int) -> None:
        self.setup = setup
        self._directory, self._record, self._share = directory, record, share
        self._ended: dict[str, Known] = {}
        self._whole: set[str] = set()  # ended trials, all of whose points the halving has
        # trials that may have finished since early stopping last decided about them
        self._undecided = {trial.name for trial in record.trials if trial.status == RUNNING}
        self._without: str | None = None  # a finished trial that has no objective
        self._is_exhausted = False  # nothing new can be drawn from the space
        self.probes = [self._process(config, {}) for config in setup.probes]
        self.processes: list[TrialProcess] = []
        for trial in record.trials:
            if trial.proposal is not None and inside(setup.space, trial.proposal):
                self.processes.append(self._proposed(trial.proposal))
        mark_what_is_done(directory, self.processes, setup.probes[0].sweep.retry_failed, record, keeps_stopped=True)
        self._halving = self._rebuilt_halving() if setup.settings.scheduler == "asha" else None

    @property
    def num_trials(self) -> int:
        """Total number of trials."""
        return self.setup.num_trials

    @property
    def description(self) -> str:
        """The search in a line."""
        return self.setup.describe()

    @property
    def has_more(self) -> bool:
        """Whether there are trials yet to be proposed."""
        return len(self.processes) < self.setup.num_trials and not self._is_exhausted

    @property
    def min_needs(self) -> dict[str, float]:
        """Minimum resources that any trial needs."""
        needs = [probe.needs for probe in self.probes]
        return {name: min(each.get(name, 0) for each in needs) for name in needs[0]}

    def next_process(self) -> TrialProcess | None:
        """Propose the next trial and record it, before it starts; None if there is none."""
        known = [self._known(process) for process in self.processes]
        if not self.has_more or self._without is not None:
            return None
        settings = self.setup.settings
        mode = self._record.mode
        words = propose(self.setup.space, settings.search, mode, settings.seed, len(self.processes), known)
        if words is None:
            self._is_exhausted = True
            return None
        process = self._proposed(words)
        try:
            mark_what_is_done(self._directory, [process], retry_failed=True, record=self._record)
        except ConfigError as error:  # a trial of an earlier sweep has that name
            process.trial.status, process.trial.error = FAILED, str(error)
        self._undecided.add(process.trial.name)
        others = [trial for trial in self._record.trials if trial.name != process.trial.name]
        self._record.trials = [*others, process.trial]
        self._record.write(self._directory)
        return process

    def settle(self) -> None:
        """Pass ended trials to early stopping, before the record says that they have ended."""
        if self._halving is not None:
            self._take_what_has_ended(self._halving)

    def to_stop(self) -> list[tuple[TrialProcess, int]]:
        """Return running trials to stop, each with the epoch whose value decides it."""
        halving = self._halving
        if halving is None:
            return []
        self.settle()
        running = [
            process for process in self.processes if process.popen is not None and process.trial.stopped_at is None
        ]
        decided = [(process, halving.decide(process.trial.name, self._curve(process))) for process in running]
        return [(process, epoch) for process, epoch in decided if epoch is not None]

    def problem(self) -> str | None:
        """Return an error if a finished trial has no objective; None otherwise."""
        for process in self.processes:
            self._known(process)
        if self._without is None:
            return None
        return (
            f"{self._without} has finished without logging {self._record.metric}, the objective: set sweep.metric to "
            f"a metric in its metrics.jsonl"
        )

    def _rebuilt_halving(self) -> Halving:
        """Rebuild the state of early stopping; it may stop an interrupted trial, which then isn't resumed."""
        settings = self.setup.settings
        halving = Halving(self._record.mode, settings.grace_epochs, settings.reduction_factor, self.setup.epochs)
        self._take_what_has_ended(halving)
        for process in self.processes:
            if process.trial.status == WAITING:
                epoch = halving.decide(process.trial.name, self._curve(process))
                process.trial.status, process.trial.stopped_at = (WAITING, None) if epoch is None else (STOPPED, epoch)
        return halving

    def _take_what_has_ended(self, halving: Halving) -> None:
        for process in self.processes:
            trial = process.trial
            if trial.status not in (FINISHED, STOPPED, FAILED) or trial.name in self._whole:
                continue
            if trial.status == FINISHED and trial.name in self._undecided and trial.stopped_at is None:
                # it finished before it could be stopped; the search's result must not depend on such timing
                trial.stopped_at = halving.decide(trial.name, self._curve(process))
            else:
                halving.take(trial.name, self._curve(process))
            self._whole.add(trial.name)

    def _curve(self, process: TrialProcess) -> list[tuple[int, float]]:
        """Return (epoch, objective) points, up to the one that stopped the trial."""
        points = curve(self._directory, process.trial, self._record.metric)
        last = process.trial.stopped_at
        return points if last is None else [(epoch, value) for epoch, value in points if epoch <= last]

    def _known(self, process: TrialProcess) -> Known:
        trial = process.trial
        assert trial.proposal is not None
        if trial.status in (WAITING, RUNNING, INTERRUPTED):
            return Known(trial.proposal, RUNNING)
        if trial.name not in self._ended:
            self._ended[trial.name] = self._outcome(process, trial.proposal)
        return self._ended[trial.name]

    def _outcome(self, process: TrialProcess, words: dict[str, str]) -> Known:
        """Return the result of an ended trial. A diverged one is the worst possible; a crashed one has none."""
        trial, state, metric = process.trial, read_state(process.run_dir), self._record.metric
        if trial.stopped_at is not None:
            return Known(words, STOPPED, curve=[value for _, value in self._curve(process)])
        if state is None or trial.status == FAILED:
            diverged = state is not None and bool(state.failures) and state.failures[-1].cause == "non_finite"
            return Known(words, STOPPED if diverged else FAILED)
        if metric not in state.metrics["last"]:
            self._without = trial.name
            return Known(words, FAILED)
        value = state.metrics["last"][metric]
        return Known(words, FINISHED, value) if _is_finite(value) else Known(words, STOPPED)

    def _proposed(self, words: dict[str, str]) -> TrialProcess:
        """Return the trial of a proposal; if its config is wrong, its status is FAILED."""
        typed = [*self.setup.fixed, *(f"{each.key}={words[plain_key(each)]}" for each in self.setup.space)]
        try:
            config, values = self.setup.compose(typed)
            process = self._process(config, values, typed)
        except ConfigError as error:
            process = self._process(self.setup.probes[0], words, typed)
            process.trial.status, process.trial.error = FAILED, str(error).replace("\n", "; ")
        process.trial.proposal = words
        return process

    def _process(self, config: Config, values: dict[str, str], words: Sequence[str] = ()) -> TrialProcess:
        workers = decide_workers(config.scaling, share=self._share, spare=spare_of(config))
        return make_process(self._directory, self._record.keys, config, values, list(words), workers)


def _is_finite(value: float | None) -> bool:  # run.json has null for NaN
    return value is not None and math.isfinite(value)


def run_search(setup: SearchSetup) -> None:
    """Run the unfinished trials of a search, and print the leaderboard.

    Raises:
        ConfigError: the sweep started with another config, or a trial can never fit; nothing was started.
        SweepFailedError: some trials failed, or there is no objective to search by.
        SystemExit: a signal stopped the sweep.
    """
    config = setup.probes[0]
    share = num_shares([config] * setup.num_trials, config.sweep.max_concurrent)
    with claimed(config) as directory:
        record = open_record(directory, config, lambda _: setup.keys)
        search = Search(directory, record, setup, share)
        run_proposed(directory, record, search, share, config)
        if (problem := search.problem()) is not None:
            raise SweepFailedError(problem)
