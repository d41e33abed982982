"""A grid: a sweep whose trials are all given at the start."""

from __future__ import annotations

from collections.abc import Sequence

from ftexp.cluster.resources import decide_workers, num_shares, spare_of
from ftexp.config.schema import Config
from ftexp.sweep.run.identity import swept_keys
from ftexp.sweep.run.preparation import claimed, make_process, mark_what_is_done, open_record, run_proposed
from ftexp.sweep.run.runner import TrialProcess


class Grid:
    """A `Proposer` of given trials: it proposes no others, and stops none early."""

    description = None
    has_more = False

    def __init__(self, processes: list[TrialProcess]) -> None:
        self.processes = self.probes = processes
        self.num_trials = len(processes)
        self.min_needs: dict[str, float] = {}

    def next_process(self) -> None:
        """Propose nothing more."""

    def to_stop(self) -> list[tuple[TrialProcess, int]]:
        """Stop none."""
        return []

    def settle(self) -> None:
        """Do nothing: proposals don't depend on results."""


def run_grid(configs: Sequence[Config], jobs: Sequence[dict[str, str]], words: list[list[str]]) -> list[float | None]:
    """Run the unfinished jobs; return the objective of each job, in order, or None if it has none.

    Args:
        configs: one for each job; `sweep` is the same in all.
        jobs: {key: value} of each job's overrides.
        words: the overrides as typed, for overrides.yaml.

    Raises:
        ConfigError: the sweep started with another config, or a trial can never fit; nothing was started.
        SweepFailedError: some trials failed; the others are done.
        SystemExit: a signal stopped the sweep.
    """
    share = num_shares(configs, configs[0].sweep.max_concurrent)
    workers = [decide_workers(config.scaling, share=share, spare=spare_of(config)) for config in configs]
    with claimed(configs[0]) as directory:
        record = open_record(directory, configs[0], lambda before: swept_keys(jobs, before))
        processes = [
            make_process(directory, record.keys, *each) for each in zip(configs, jobs, words, workers, strict=True)
        ]
        mark_what_is_done(directory, processes, configs[0].sweep.retry_failed, record)
        return run_proposed(directory, record, Grid(processes), share, configs[0])
