"""The parts of one worker's job."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ftexp.config.schema import Config
from ftexp.data.info import DataInfo
from ftexp.job.data import TrainingData
from ftexp.job.group import ProcessGroup
from ftexp.job.hooks import Hooks
from ftexp.job.learner import Learner
from ftexp.job.mfu import Utilisation
from ftexp.job.progress import Progress
from ftexp.job.stopwatch import Stopwatch
from ftexp.rundir.sample_ledger import SampleLedger
from ftexp.wire.channel import Channel


@dataclass(frozen=True)
class RunIdentity:
    """A run, and the number of this attempt."""

    name: str
    attempt: int  # worker groups of this run so far, this one included
    fingerprint: dict[str, Any]  # the config keys that define the run
    # attempt -> its last step whose state in memory the run descends from; None: any
    lineage: dict[int, int | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One rank's part of a run. The objects change during training, but are never replaced."""

    config: Config
    info: DataInfo
    run: RunIdentity
    channel: Channel
    group: ProcessGroup
    learner: Learner
    data: TrainingData
    progress: Progress
    ledger: SampleLedger
    stopwatch: Stopwatch
    utilisation: Utilisation
    hooks: Hooks

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return math.ceil(self.progress.total_positions / self.config.train.global_batch_size)
