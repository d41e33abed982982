"""run.json: how a run stands, and what its failures cost."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from typing import Any

from ftexp.config.versions import package_versions
from ftexp.rundir.names import RUN_FILE
from ftexp.storage.directory import Storage

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(kw_only=True)
class Failure:
    """One failure of the worker group. Times in seconds; None while it isn't known."""

    attempt: int
    cause: str
    rank: int | None
    step: int  # the last that was seen done
    error: str
    # from the death of the process, its exception, or else its last sign of life, until Ray reports the failure
    seconds_to_detect: float | None = None
    seconds_to_restart: float | None = None  # from there to the start of the new worker group
    seconds_to_restore: float | None = None  # from there to the first batch
    seconds_to_new_step: float | None = None  # from there to the end of the first step that had never been done before
    steps_replayed: int | None = None
    recovery: str | None = None  # what training continued from: replaced, memory, storage or start; None: it didn't yet
    node: str | None = None  # that the rank ran on
    progressed: bool = True  # whether its attempt did a step that had never been done before
    decision: str = ""  # what happened then, and the arithmetic behind it

    @property
    def where(self) -> str:
        """The failed part, as the beginning of a sentence."""
        if self.cause == "ray":
            return "Ray"
        return f"rank {self.rank}" if self.rank is not None else "a worker"


@dataclass(kw_only=True)
class RunState:
    """The content of run.json."""

    name: str
    status: str = RUNNING
    model: dict[str, Any] = field(default_factory=dict)  # arguments of timm.create_model
    data: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # config keys that define the run
    attempts: int = 0
    world_sizes: list[int] = field(default_factory=list)  # world size of each attempt
    failures: list[Failure] = field(default_factory=list)
    accumulate_steps: int | None = None  # since memory ran out, if more than configured
    skipped: list[list[int]] = field(default_factory=list)  # [start, end) positions that drive no update
    step: int = 0
    farthest_step: int = 0  # that was ever done: after a restart, `step` is behind it until what was lost is done again
    epoch: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=lambda: {"last": {}, "best": {}})
    checkpoint: str | None = None  # the latest saved, under checkpoints/
    error: str | None = None
    stopped: dict[str, Any] | None = None  # step, epoch, reason and rules, where the run was ended early: StoppedEarly
    snapshots: dict[str, Any] | None = None  # in memory: steps from one to the next, and what one costs: SnapshotsTaken
    started: float = field(default_factory=time.time)  # seconds since 1970
    seconds: float = 0.0  # wall time over all calls of the command
    productive_s: float = 0.0  # seconds on steps that had not been done before, and what they brought along
    goodput: float | None = None  # productive_s / seconds
    versions: dict[str, str] = field(default_factory=package_versions)
    hardware: dict[str, Any] = field(default_factory=dict)  # hardware of rank 0's node, in the latest attempt


def read_state(storage: Storage) -> RunState | None:
    """Return the state of a run directory's run; None if there is no run in it."""
    try:
        content = json.loads(storage.read_bytes(RUN_FILE))
    except FileNotFoundError:
        return None
    known = {field.name for field in dataclasses.fields(RunState)}
    content["failures"] = [Failure(**failure) for failure in content.get("failures", [])]
    return RunState(**{key: value for key, value in content.items() if key in known})
