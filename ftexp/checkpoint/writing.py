"""The background part of saving a checkpoint: serialising, hashing, writing, reading back, the report to Ray.

It runs on one thread of each rank; at most one checkpoint is in flight. If the model is sharded, each rank of the first
replica writes its own files. Rank 0 writes the manifest once every rank has reported the sizes and hashes of its files.
The threads have their own process group, since training uses the default one meanwhile. It needs no polling, and if a
rank dies, the others stop waiting at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray.train
import torch.distributed as dist

from ftexp.checkpoint.full_model import add_full_models
from ftexp.checkpoint.manifest import EXTRA, MODEL, Manifest, checkpoint_name, kept_names, shard_file
from ftexp.checkpoint.priority import give_way
from ftexp.checkpoint.sharding import Piece, Place, pieces_in, skeleton, slices_of
from ftexp.checkpoint.slices import SliceFile
from ftexp.checkpoint.staging import is_finite, writer
from ftexp.checkpoint.store import CheckpointStore
from ftexp.errors import CheckpointError, NonFiniteError
from ftexp.storage.directory import Writer
from ftexp.wire import events
from ftexp.wire.messages import UNSAVED, EvaluateCheckpoint, Evaluated, Happened

if TYPE_CHECKING:
    from ftexp.config.schema import CheckpointConfig
    from ftexp.job.group import ProcessGroup
    from ftexp.job.progress import Pending
    from ftexp.wire.channel import Channel

NOT_FINITE = (
    "the weights are not finite, so this step is not worth keeping: lower optim.lr, set train.clip_grad_norm, or see "
    "failure.on_nonfinite"
)
_LAST_TRIES_S = (1, 2, 4, 8, 16)  # delays before retries of the checkpoint that ends the run


@dataclass(frozen=True)
class Saving:
    """One rank's part of a checkpoint in flight."""

    manifest: Manifest
    parts: dict[str, Any]  # content by name of FILES; empty if this rank writes nothing
    place: Place | None  # this rank's place; None: the checkpoint is not sharded
    metrics: dict[str, Any]
    about: dict[str, Any]  # further fields of the event
    is_last: bool
    is_end: bool  # whether the last step of the run is done
    pending: tuple[Pending, ...]  # evaluations of this checkpoint or of earlier ones
    best_step: int | None

    @property
    def steps_to_keep(self) -> set[int]:
        """Steps whose checkpoints are kept, whatever else is removed."""
        best = set() if self.best_step is None else {self.best_step}
        return best | {pending.step for pending in self.pending}

    def is_finite(self) -> bool:
        """Return whether this rank's part of the weights is finite."""
        held = self.parts.get(MODEL, {}).values()
        return all(each.with_rows(is_finite) if isinstance(each, Piece) else is_finite(each) for each in held)

    def files(self, rank: int) -> dict[str, Writer]:
        """Return the files that this rank writes, by name."""
        if self.place is None or not self.parts:
            return {name: writer(part) for name, part in self.parts.items()}
        shard, num_shards, files = self.place.shard, self.place.num_shards, dict[str, Writer]()
        if rank == 0:
            files[EXTRA] = writer({name: skeleton(part) for name, part in self.parts.items()})
        for name, part in self.parts.items():
            if pieces := pieces_in(part):
                files[shard_file(name, shard, num_shards)] = SliceFile(slices_of(pieces))
        return files


class _Agreement:
    """The process group of all ranks' writing threads; a thread that writes alone has none."""

    def __init__(self, is_alone: bool, timeout_s: float | None) -> None:
        self._group: dist.ProcessGroup | None = None
        if not is_alone and dist.is_initialized():
            timeout = timedelta(seconds=timeout_s) if timeout_s is not None else None
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]  # this is in it

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value, of any type that pickles, on every rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, value, group=self._group)
        return found


class CheckpointWriter:
    """Writes one rank's part of each checkpoint. `failures`: errors since the last success, on rank 0.

    is_sharded: whether every rank writes, instead of rank 0 alone; then building a writer is collective.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        group: ProcessGroup,
        channel: Channel,
        store: CheckpointStore,
        is_sharded: bool,
        timeout_s: float | None,
    ) -> None:
        self._config, self._rank, self._channel, self._store = config, group.rank, channel, store
        self._writes = is_sharded or group.rank == 0
        self._agreement = _Agreement(not is_sharded, timeout_s)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=give_way)
        self._pending: Future[None] | None = None
        self.failures: list[Exception] = []

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is in flight on this rank."""
        return self._pending is not None and not self._pending.done()

    def begin(self, saving: Saving) -> None:
        """Start writing a checkpoint; the previous one must be done."""
        self._pending = self._thread.submit(self._write, saving)

    def wait(self) -> None:
        """Wait until no checkpoint is in flight on this rank."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait for the last checkpoint, and end the thread."""
        self.wait()
        self._thread.shutdown()

    def note_failed(self, step: int, error: Exception) -> None:
        """Count and report a checkpoint that failed, if this is rank 0."""
        if self._rank == 0:
            self.failures.append(error)
            self._channel.send(Happened(events.CheckpointFailed(step, str(error))))

    def note_unsaved(self, manifest: Manifest) -> None:
        """Report that a checkpoint was not saved, so that nobody waits for its evaluation."""
        about = (manifest.step, manifest.epoch, checkpoint_name(manifest.step, manifest.attempt))
        self._channel.note_evaluated(Evaluated(*about, failure=UNSAVED, problem="its checkpoint was not saved"))

    def _write(self, saving: Saving) -> None:
        """On the thread: write, delete old checkpoints, report to Ray. Ranks that write nothing wait in their report.

        The report contains no checkpoint. If it did, Ray's control loop would write its own snapshot into the run
        directory, and a storage that is down for a moment would end the run. The manifests record what was saved.
        """
        if self._writes and not self._tried(saving):
            self.note_unsaved(saving.manifest)
        ray.train.report(saving.metrics)

    def _tried(self, saving: Saving) -> bool:
        """Write the checkpoint, with retries if it is the last; returns success, the same on every rank that writes."""
        step = saving.manifest.step
        if not all(self._agreement.gather(saving.is_finite())):
            self.note_failed(step, NonFiniteError(NOT_FINITE))
            return False
        for wait_s in (*(_LAST_TRIES_S if saving.is_last else ()), None):
            if (error := self._write_once(saving)) is None:
                self.failures.clear()
                return True
            self.note_failed(step, error)
            if wait_s is not None:
                time.sleep(wait_s)
        return False

    def _write_once(self, saving: Saving) -> Exception | None:
        """Write this rank's files; rank 0 commits them if every rank succeeded. Returns the error; None on success."""
        started, files = time.perf_counter(), dict[str, dict[str, Any]]()
        problem: Exception | None = None
        try:
            files = self._store.write(saving.manifest.name, saving.files(self._rank))
        except (OSError, CheckpointError) as error:
            problem = error
        found = self._agreement.gather((files, problem and str(problem)))
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text is not None]
        if problem is None and failed:
            problem = CheckpointError(failed[0])
        if self._rank == 0 and problem is None:
            problem = self._committed(
                saving, {name: each for files, _ in found for name, each in files.items()}, started
            )
        if self._rank == 0 and problem is not None:
            self._store.discard(saving.manifest.name)
        if self._agreement.gather(problem and str(problem))[0] is not None:
            return problem or CheckpointError("rank 0 could not commit the checkpoint")
        return None

    def _committed(self, saving: Saving, files: dict[str, dict[str, Any]], started: float) -> Exception | None:
        """Commit the checkpoint, report it, delete old ones; returns the error if it can't be committed."""
        try:
            self._channel.sync()  # everything logged up to this step must be written before the checkpoint exists
            saved = self._store.commit(dataclasses.replace(saving.manifest, files=files))
        except (OSError, CheckpointError) as error:
            return error
        self._announce(saving, saved, time.perf_counter() - started)
        with contextlib.suppress(OSError):  # the storage is down now: the next checkpoint deletes old ones
            manifests = self._store.manifests(lambda *_: None)
            kept = kept_names(manifests, self._config.num_to_keep, saving.steps_to_keep)
            self._store.delete_all_but(kept)
        if saved.mesh is not None:
            self._add_full_models(saving, saved)
        return None

    def _announce(self, saving: Saving, saved: Manifest, write_s: float) -> None:
        event = events.CheckpointSaved(
            step=saved.step,
            checkpoint=saved.name,
            bytes=saved.num_bytes,
            write_s=round(write_s, 6),
            metrics=saved.metrics,
            **saving.about,
        )
        self._channel.send(Happened(event))
        for pending in saving.pending:
            if pending.checkpoint == saved.name:
                self._channel.send(EvaluateCheckpoint(**vars(pending)))

    def _add_full_models(self, saving: Saving, saved: Manifest) -> None:
        """Add model.pt to the checkpoints that are to have it now; errors are only reported."""
        is_best = saving.best_step == saved.step
        wanted = {"end": saving.is_end, "best": saving.is_end or is_best, "never": False}[self._config.full_at]
        if not wanted:
            return
        steps: set[int | None] = {saved.step, saving.best_step} if saving.is_end else {saved.step}
        for name, problem in add_full_models(self._store, steps):
            self._channel.send(Happened(events.FullModelFailed(saved.step, name, str(problem))))
