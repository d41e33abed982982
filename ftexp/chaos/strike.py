"""Injection of faults: at one step, on one rank, once per run, even if the step is repeated.

A fault is recorded in the run directory, as chaos/<fault>, before it strikes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import signal
import time
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from ftexp.chaos.plan import Fault
from ftexp.checkpoint.manifest import MANIFEST
from ftexp.checkpoint.store import CheckpointStore
from ftexp.cluster import ray_private
from ftexp.config.schema import DAMAGES
from ftexp.rundir.names import CHAOS, CHECKPOINTS
from ftexp.storage.directory import Storage, Writer
from ftexp.wire import events
from ftexp.wire.messages import ForgetSnapshots, Happened, KillDriver

if TYPE_CHECKING:
    from torch import nn

    from ftexp.checkpoint.manager import CheckpointManager
    from ftexp.data.batches import Batch
    from ftexp.job.group import ProcessGroup
    from ftexp.job.progress import Progress
    from ftexp.job.skipped_batches import SkippedBatches
    from ftexp.wire.channel import Channel

_STEMS = ("model.", "optimizer.")  # file names without suffix, of a checkpoint or of the shard of its first worker
_OF_THE_STORE = ("disk_full", "slow_storage")  # happen on rank 0, which writes checkpoints


class ChaosError(RuntimeError):
    """The error of `chaos=raise`."""


class FaultyStore(CheckpointStore):
    """A store whose next checkpoints fail half-way, or take longer."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.num_failing = self.num_slow = 0
        self.delay_s = 0.0

    def write(self, name: str, files: Mapping[str, Writer]) -> dict[str, dict[str, Any]]:
        """Write as the base class does, unless a fault is due."""
        if self.num_slow:
            self.num_slow -= 1
            time.sleep(self.delay_s)
        if self.num_failing:
            self.num_failing -= 1
            full = next((file for file in files if file.startswith(_STEMS[1])), next(iter(files)))
            files = {**files, full: _write_on_a_full_disk}
        return super().write(name, files)


def _write_on_a_full_disk(stream: BinaryIO) -> None:
    stream.write(b"as much as there is room for")
    raise OSError(errno.ENOSPC, "No space left on device (chaos)")


def poisoned(batch: Batch) -> Batch:
    """Return the batch with NaN in images, so that neither its loss nor its gradient is finite."""
    first, *others = batch.micro_batches
    return dataclasses.replace(
        batch, micro_batches=[dataclasses.replace(first, images=first.images * math.nan), *others]
    )


class Chaos:
    """Injects one rank's planned faults. The run saves to `store`, and trains on the batches of `feeding`."""

    def __init__(
        self,
        faults: list[Fault],
        group: ProcessGroup,
        progress: Progress,
        skipped: SkippedBatches,
        channel: Channel,
        run_dir: Storage,
    ) -> None:
        self._group, self._progress, self._skipped, self._channel = group, progress, skipped, channel
        self._run_dir = run_dir
        self.store = FaultyStore(run_dir.child(CHECKPOINTS))
        self._poisons = False  # whether the next batch that is trained on will be poisoned
        self._num_slow, self._slow_s = 0, 0.0  # number of steps to delay, and the delay of each
        self._by_step: dict[int, list[Fault]] = {}
        for fault in faults:
            if group.rank == (0 if fault.kind in _OF_THE_STORE else fault.rank % group.world_size):
                self._by_step.setdefault(fault.step, []).append(fault)

    def feeding(self, batches: Generator[Batch]) -> Generator[Batch]:
        """Yield `batches`, poisoned or delayed where a fault requires it."""
        with contextlib.closing(batches):
            for batch in batches:
                if self._num_slow:
                    self._num_slow -= 1
                    time.sleep(self._slow_s)
                if self._poisons and not self._skipped.cover(batch.start):
                    self._poisons = False
                    yield poisoned(batch)
                else:
                    yield batch

    def strike(self, checkpoints: CheckpointManager, model: nn.Module) -> None:
        """Inject the faults that are planned after the current step, unless they have happened before."""
        for fault in self._by_step.get(self._progress.step, ()):
            if not self._run_dir.exists(f"{CHAOS}/{fault.name}"):
                self._strike(fault, checkpoints, model)

    def _strike(self, fault: Fault, checkpoints: CheckpointManager, model: nn.Module) -> None:
        if fault.kind in DAMAGES or fault.kind == "half_snapshot":
            checkpoints.wait()  # so that the newest checkpoint is hit
        self._run_dir.child(CHAOS).write_bytes(fault.name, b"")
        damaged = self._damage(fault) if fault.kind in DAMAGES else None
        self._channel.send(Happened(events.Chaos(fault.kind, self._group.rank, fault.step, damaged)))
        if damaged is not None:  # otherwise the run would resume from memory, and never read them
            self._channel.send(ForgetSnapshots())
        self._channel.flush()
        match fault.kind:
            case "raise":
                raise ChaosError(f"chaos=raise at step {fault.step} on rank {self._group.rank}")
            case "hang":
                time.sleep(fault.seconds)
            case "nonfinite":
                self._poisons = True
            case "flip_weight":
                flip_bit(next(model.parameters()))
            case "disk_full":
                self.store.num_failing = fault.count
            case "slow_rank":
                self._num_slow, self._slow_s = fault.count, fault.seconds
            case "slow_storage":
                self.store.num_slow, self.store.delay_s = fault.count, fault.seconds
            case "half_snapshot":
                self._halve_snapshot()
                self._kill_driver()
            case "kill_driver":
                self._kill_driver()
            case _:
                os.kill(os.getpid(), signal.SIGKILL)

    def _kill_driver(self) -> None:
        self._channel.send(KillDriver())
        time.sleep(3600)  # this process ends when the driver dies

    def _halve_snapshot(self) -> None:
        """Write the truncated file that Ray Train leaves if it is killed while it writes its bookkeeping in place."""
        self._run_dir.write_bytes(ray_private.SNAPSHOT, b'{"checkpoint_results": [{"checkpoint_dir_name": "step_')

    def _damage(self, fault: Fault) -> list[str]:
        """Damage the newest `fault.count` checkpoints; returns their names."""
        names = [manifest.name for manifest in self.store.manifests(lambda *_: None)][: fault.count]
        for name in names:
            damage(self.store.storage.child(name), fault.kind)
        return names


def flip_bit(parameter: Tensor) -> None:
    """Flip the lowest bit of a parameter's first value, which no loss would show."""
    first = parameter.detach().view(-1)[:1]
    first.view({2: torch.int16, 4: torch.int32}[parameter.element_size()]).bitwise_xor_(1)


def damage(directory: Storage, kind: str) -> None:
    """Damage the checkpoint in `directory`: halve a file, flip a bit of another, or delete files."""
    if kind == "delete_checkpoint":
        directory.delete()
    elif kind == "delete_manifest":
        directory.delete_file(MANIFEST)
    elif kind == "truncate_checkpoint":
        name = _file_of(directory, _STEMS[0])
        content = directory.read_bytes(name)
        directory.write_bytes(name, content[: len(content) // 2])
    elif kind == "flip_byte":
        name = _file_of(directory, _STEMS[1])
        flipped = bytearray(directory.read_bytes(name))
        flipped[len(flipped) // 2] ^= 1
        directory.write_bytes(name, bytes(flipped))
    else:
        raise AssertionError(f"{kind} is no damage")


def _file_of(directory: Storage, stem: str) -> str:
    """Return a checkpoint's file whose name begins with `stem`; of several, the first worker's."""
    return next(name for name in directory.list_files() if name.startswith(stem))
