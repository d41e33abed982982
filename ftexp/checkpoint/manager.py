"""When to save, and what a save costs the training thread: a copy of the state, and nothing else.

Serialising, hashing, writing and Ray's report run on a thread; there is one save in flight at the most.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray.train
import torch

from ftexp.checkpoint.registry import ExtraState
from ftexp.checkpoint.store import FILES, CheckpointStore, Manifest, kept_names
from ftexp.errors import CheckpointError
from ftexp.versions import package_versions

if TYPE_CHECKING:
    from ftexp.job import Job

_MODEL, _OPTIMIZER, _EXTRA = FILES


class CheckpointManager:
    """Saves and restores one rank's `Job`. Its methods are called by every rank at the same steps."""

    def __init__(self, job: Job, store: CheckpointStore, extra: ExtraState) -> None:
        self._job, self._store, self._extra = job, store, extra
        self._config = job.config.checkpoint
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved_step = -1  # of the last save that was begun
        self._failure: Exception | None = None  # of the last save, if it failed

    def due(self, epoch_ended: bool) -> bool:
        """Whether the cadence asks for a save after the step just done."""
        progress, config = self._job.progress, self._config
        if progress.step == self._saved_step:
            return False
        by_steps = config.every_steps is not None and progress.step % config.every_steps == 0
        by_epochs = config.every_epochs is not None and epoch_ended and progress.epoch % config.every_epochs == 0
        return by_steps or by_epochs or progress.position >= self._job.total_positions

    def save(self) -> None:
        """Copy the state and have it written; collective. Waits if the save before isn't done yet."""
        started = time.perf_counter()
        self.wait()
        job, progress = self._job, self._job.progress
        extra = self._extra.state_dict()
        metrics = {"epoch": progress.epoch, "step": progress.step, **progress.metrics}
        if job.rank != 0:
            self._pending = self._thread.submit(ray.train.report, metrics)
        else:
            parts = _copied_to_cpu((job.model.state_dict(), job.optimizer.state_dict(), extra))
            manifest = Manifest(
                name=f"step_{progress.step:08d}.a{job.attempt}",
                step=progress.step,
                epoch=progress.epoch,
                position=progress.position,
                attempt=job.attempt,
                world_size=job.world_size,
                metrics=dict(progress.metrics),
                state_versions=self._extra.versions(),
                written_by=f"run '{job.run_name}' on {time.strftime('%Y-%m-%d %H:%M:%S')}",
                versions=package_versions(),
            )
            blocked_s = time.perf_counter() - started
            best_step = job.best.get("step")
            self._pending = self._thread.submit(self._write, manifest, parts, metrics, best_step, blocked_s)
        self._saved_step = progress.step

    def wait(self) -> None:
        """Return when no save is in flight, on this rank."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def finish(self) -> None:
        """Wait for the last save; CheckpointError if it could not be written."""
        self.wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise CheckpointError(f"the last checkpoint could not be written: {self._failure}") from self._failure

    def restore(self, manifest: Manifest, files: dict[str, bytes]) -> None:
        """Load a verified checkpoint into the job; StateError if its states are not the configured ones."""
        loaded = {name: load_part(name, content) for name, content in files.items()}
        try:
            self._job.model.load_state_dict(loaded[_MODEL])
            self._job.optimizer.load_state_dict(loaded[_OPTIMIZER])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {manifest.name}, of {manifest.written_by}, does not fit this model or optimiser: {error}"
            ) from error
        self._extra.load(loaded[_EXTRA], manifest.state_versions, manifest.written_by)
        self._saved_step = manifest.step

    def _write(
        self,
        manifest: Manifest,
        parts: tuple[Any, ...],
        metrics: dict[str, Any],
        best_step: int | None,
        blocked_s: float,
    ) -> None:
        """On the thread, rank 0 only: write, thin out, report to Ray. The other ranks wait in their report."""
        started, checkpoint = time.perf_counter(), None
        line = self._job.line
        try:
            files = {name: _serialised(part) for name, part in zip(FILES, parts, strict=True)}
            line.flush()  # what was logged up to this step must not be lost once the step is saved
            saved = self._store.save(manifest, files)
        except (OSError, CheckpointError) as error:
            self._failure = error
            line.send("event", name="checkpoint_failed", step=manifest.step, error=str(error))
        else:
            self._failure = None
            line.send(
                "event",
                name="checkpoint_saved",
                step=saved.step,
                checkpoint=saved.name,
                bytes=sum(file["bytes"] for file in saved.files.values()),
                blocked_s=round(blocked_s, 6),
                write_s=round(time.perf_counter() - started, 6),
                metrics=saved.metrics,
            )
            manifests = self._store.manifests(lambda *_: None)
            self._store.delete_all_but(kept_names(manifests, self._config.num_to_keep, best_step))
            filesystem, path = self._store.storage.child(saved.name).open()
            checkpoint = ray.train.Checkpoint(path, filesystem)
        mode = ray.train.CheckpointUploadMode.NO_UPLOAD
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=mode)


def _copied_to_cpu(value: Any) -> Any:
    """A deep copy with every tensor on the CPU, which later steps don't change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied_to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied_to_cpu(item) for item in value)
    return value


def _serialised(part: Any) -> memoryview:
    buffer = io.BytesIO()
    torch.save(part, buffer)
    return buffer.getbuffer()


def load_part(name: str, content: bytes) -> Any:
    """Read one file of a checkpoint onto the CPU without running code in it; CheckpointError if it has any."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError or EOFError, by what is wrong
        raise CheckpointError(f"{name} can't be loaded as plain data: {error}") from error
