"""Faults on purpose: at one step, on one rank, once per run, however often the step is done again.

What has happened is kept in the run directory, chaos/<fault>, written before the fault strikes.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ftexp.checkpoint.store import FILES, MANIFEST, CheckpointStore, Manifest
from ftexp.cluster import ray_private
from ftexp.config.schema import DAMAGES, ChaosConfig, fault_fields
from ftexp.data.order import derive_seed, uniforms
from ftexp.rundir.names import CHAOS
from ftexp.storage.directory import Storage, Writer
from ftexp.wire import events
from ftexp.wire.messages import Happened, KillDriver

if TYPE_CHECKING:
    from ftexp.checkpoint.manager import CheckpointManager
    from ftexp.job.job import Job

_OF_THE_STORE = ("disk_full", "slow_storage")  # happen to rank 0, which does the writing


class ChaosError(RuntimeError):
    """Raised by `chaos=raise`."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong after `step`."""

    name: str  # unique in the run
    kind: str
    step: int
    rank: int
    count: int
    seconds: float


def planned_faults(config: ChaosConfig, total_steps: int) -> list[Fault]:
    """Every fault of a run of `total_steps`, by step: a pure function, the same on every rank and in every attempt."""
    if config.kind == "random":
        return _random_faults(config, total_steps)
    listed = [fault_fields(fault) for fault in config.faults]
    if config.kind != "none":
        listed.insert(0, {"kind": config.kind, "step": config.step})
    faults = []
    for number, fault in enumerate(listed):
        # without a step of their own they are spread evenly
        step = fault.get("step") or max(1, total_steps * (number + 1) // (len(listed) + 1))
        own = {name: fault.get(name, getattr(config, name)) for name in ("rank", "count", "seconds")}
        faults.append(Fault(f"{number:02d}-{fault['kind']}", fault["kind"], step, **own))
    return sorted(faults, key=lambda fault: fault.step)


def _random_faults(config: ChaosConfig, total_steps: int) -> list[Fault]:
    seed, steps = derive_seed(config.seed), np.arange(1, total_steps)
    struck = steps[uniforms(seed, steps, 0) < config.rate]
    kinds = [config.kinds[int(draw * len(config.kinds))] for draw in uniforms(seed, struck, 1)]
    ranks = [int(draw * 2**20) for draw in uniforms(seed, struck, 2)]  # taken modulo the number of workers
    return [
        Fault(f"step{step:08d}-{kind}", kind, step, rank, config.count, config.seconds)
        for step, kind, rank in zip(struck.tolist(), kinds, ranks, strict=True)
    ]


class FaultyStore(CheckpointStore):
    """A store whose next saves fail half-way, or take longer."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.num_failing = self.num_slow = 0
        self.delay_s = 0.0

    def save(self, manifest: Manifest, files: Mapping[str, Writer]) -> Manifest:
        """As the base class does, unless a fault is due."""
        if self.num_slow:
            self.num_slow -= 1
            time.sleep(self.delay_s)
        if self.num_failing:
            self.num_failing -= 1
            files = {**files, FILES[1]: _write_on_a_full_disk}
        return super().save(manifest, files)


def _write_on_a_full_disk(stream: BinaryIO) -> None:
    stream.write(b"as much as there is room for")
    raise OSError(errno.ENOSPC, "No space left on device (chaos)")


class Chaos:
    """Lets one rank's planned faults happen."""

    def __init__(self, job: Job, store: FaultyStore, checkpoints: CheckpointManager, run_dir: Storage) -> None:
        self._job, self._store, self._checkpoints = job, store, checkpoints
        self._run_dir = run_dir
        self._by_step: dict[int, list[Fault]] = {}
        for fault in planned_faults(job.config.chaos, job.total_steps):
            if job.rank == (0 if fault.kind in _OF_THE_STORE else fault.rank % job.world_size):
                self._by_step.setdefault(fault.step, []).append(fault)

    def strike(self) -> None:
        """Let happen what is planned after the step just done, unless it has happened before."""
        for fault in self._by_step.get(self._job.progress.step, ()):
            if not self._run_dir.exists(f"{CHAOS}/{fault.name}"):
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        job, store = self._job, self._store
        if fault.kind in DAMAGES or fault.kind == "half_snapshot":
            self._checkpoints.wait()  # so that it is the newest checkpoint that is hit
        self._run_dir.child(CHAOS).write_bytes(fault.name, b"")
        damaged = self._damage(fault) if fault.kind in DAMAGES else None
        job.line.send(Happened(events.Chaos(fault.kind, job.rank, fault.step, damaged)))
        job.line.flush()
        match fault.kind:
            case "raise":
                raise ChaosError(f"chaos=raise at step {fault.step} on rank {job.rank}")
            case "hang":
                time.sleep(fault.seconds)
            case "nonfinite":
                job.poisoned = True
            case "disk_full":
                store.num_failing = fault.count
            case "slow_storage":
                store.num_slow, store.delay_s = fault.count, fault.seconds
            case "half_snapshot":
                self._halve_snapshot()
                self._kill_driver()
            case "kill_driver":
                self._kill_driver()
            case _:
                os.kill(os.getpid(), signal.SIGKILL)

    def _kill_driver(self) -> None:
        self._job.line.send(KillDriver())
        time.sleep(3600)  # the driver's death ends this process

    def _halve_snapshot(self) -> None:
        """Leave what Ray Train leaves when it is killed while it writes its bookkeeping in place."""
        self._run_dir.write_bytes(ray_private.SNAPSHOT, b'{"checkpoint_results": [{"checkpoint_dir_name": "step_')

    def _damage(self, fault: Fault) -> list[str]:
        """Break the newest `fault.count` checkpoints; returns their names."""
        names = [manifest.name for manifest in self._store.manifests(lambda *_: None)][: fault.count]
        for name in names:
            damage(self._store.storage.child(name), fault.kind)
        return names


def damage(folder: Storage, kind: str) -> None:
    """Break the checkpoint in `folder`: half of model.pt gone, a bit of optimizer.pt flipped, or files missing."""
    if kind == "delete_checkpoint":
        folder.delete()
    elif kind == "delete_manifest":
        folder.delete_file(MANIFEST)
    elif kind == "truncate_checkpoint":
        content = folder.read_bytes(FILES[0])
        folder.write_bytes(FILES[0], content[: len(content) // 2])
    elif kind == "flip_byte":
        flipped = bytearray(folder.read_bytes(FILES[1]))
        flipped[len(flipped) // 2] ^= 1
        folder.write_bytes(FILES[1], bytes(flipped))
    else:
        raise AssertionError(f"{kind} is no damage")
