"""run.json: the state of a run, and the cost of its failures."""

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
    """One failure of the worker group. Times in seconds; None until known."""

    attempt: int
    cause: str
    rank: int | None
    step: int  # last step that was reported as done
    error: str
    # from the process's death, its exception, or else its last sign of life, until Ray reports the failure
    seconds_to_detect: float | None = None
    seconds_to_restart: float | None = None  # from there to the start of the new worker group
    seconds_to_restore: float | None = None  # from there to the first batch
    seconds_to_new_step: float | None = None  # from there to the end of the first new step
    steps_replayed: int | None = None
    recovery: str | None = None  # source of the next state: replaced, memory, storage or start; None: not yet resumed
    node: str | None = None  # node of the rank
    progressed: bool = True  # whether its attempt did a new step
    decision: str = ""  # the reaction to it, and the arithmetic behind that

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
    accumulate_steps: int | None = None  # set after an out-of-memory error, if more than configured
    skipped: list[list[int]] = field(default_factory=list)  # [start, end) positions that drive no update
    step: int = 0
    farthest_step: int = 0  # highest step done; after a restart, `step` is below it until lost steps are repeated
    epoch: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=lambda: {"last": {}, "best": {}})
    checkpoint: str | None = None  # name of the latest, under checkpoints/
    error: str | None = None
    stopped: dict[str, Any] | None = None  # step, epoch, reason and rules of an early stop: StoppedEarly
    snapshots: dict[str, Any] | None = None  # in memory: their interval, and the cost of one: SnapshotsTaken
    started: float = field(default_factory=time.time)  # seconds since 1970
    seconds: float = 0.0  # wall time over all invocations
    productive_s: float = 0.0  # seconds on new steps, including the work between them
    goodput: float | None = None  # productive_s / seconds
    versions: dict[str, str] = field(default_factory=package_versions)
    hardware: dict[str, Any] = field(default_factory=dict)  # hardware of rank 0's node, in the latest attempt


def read_state(storage: Storage) -> RunState | None:
    """Return the state of the run in a directory; None if there is no run."""
    try:
        content = json.loads(storage.read_bytes(RUN_FILE))
    except FileNotFoundError:
        return None
    known = {field.name for field in dataclasses.fields(RunState)}
    content["failures"] = [Failure(**failure) for failure in content.get("failures", [])]
    return RunState(**{key: value for key, value in content.items() if key in known})
