"""What a save costs the training thread: a copy of the state, and nothing else.

Serialising, hashing, writing and Ray's report run on a thread; there is one save in flight at the most.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray.train

from ftexp.checkpoint.cadence import Cadence
from ftexp.checkpoint.registry import ExtraState
from ftexp.checkpoint.staging import Staging, is_finite, load_part, writer
from ftexp.checkpoint.store import FILES, CheckpointStore, Manifest, checkpoint_name, kept_names
from ftexp.config.versions import package_versions
from ftexp.errors import CheckpointError, NonFiniteError, StorageError
from ftexp.model.parallel.parts import local
from ftexp.wire import events
from ftexp.wire.messages import UNSAVED, EvaluateCheckpoint, Evaluated, Happened

if TYPE_CHECKING:
    from ftexp.config.schema import Config
    from ftexp.job.group import ProcessGroup
    from ftexp.job.job import RunIdentity
    from ftexp.job.learner import Learner
    from ftexp.job.progress import Pending, Progress
    from ftexp.rundir.sample_ledger import SampleLedger
    from ftexp.wire.channel import Channel

_MODEL, _OPTIMIZER, _EXTRA = FILES
_ASKS_PER_PREEMPTION_POLL = 3  # the cadence asks about once a second; a poll costs 30 ms
_NOT_FINITE = "the weights are not finite, so this step is not worth keeping"
_LAST_TRIES_S = (1, 2, 4, 8, 16)  # waits before trying again to write the checkpoint that ends the run
_LOWEST = 19
_NICE = 10  # a tenth of a core where training wants it all; with less (19: a hundredth), saves could starve


@dataclass(frozen=True)
class _Saving:
    """A save that is under way, on rank 0."""

    manifest: Manifest
    parts: tuple[Any, ...]
    metrics: dict[str, Any]
    about: dict[str, Any]  # the save, for its event
    is_last: bool
    pending: tuple[Pending, ...]  # evaluations, of this checkpoint or of earlier ones
    best_step: int | None

    @property
    def steps_to_keep(self) -> set[int]:
        """Steps whose checkpoints are kept, whatever else is removed."""
        best = set() if self.best_step is None else {self.best_step}
        return best | {pending.step for pending in self.pending}


class CheckpointManager:
    """Saves and restores one rank's part of a run. Its methods are called by every rank at the same steps.

    `num_rollbacks` counts those to the copy in memory since it was made.
    """

    def __init__(
        self,
        *,
        config: Config,
        run: RunIdentity,
        group: ProcessGroup,
        learner: Learner,
        progress: Progress,
        ledger: SampleLedger,
        channel: Channel,
        store: CheckpointStore,
        extra: ExtraState,
    ) -> None:
        self._run, self._group, self._learner, self._progress = run, group, learner, progress
        self._ledger, self._channel, self._store, self._extra = ledger, channel, store, extra
        self._config = config.checkpoint
        self._is_local = config.scaling.address is None  # a Ray on this machine alone goes when the machine goes
        self._has_ledger = config.train.ledger
        self._keeps = config.failure.on_nonfinite == "rollback"  # each save's state in memory, on every rank
        self._cadence = Cadence(
            self._config,
            group.agree,
            stop_requested=lambda: channel.stop_requested,
            machine_goes=self._preemption_announced,
            save_requested=self._save_requested,
        )
        self._num_asked = 0
        self._leaving: set[str] = set()  # nodes that were announced to go away
        self._staging = Staging(group.device)
        self.num_rollbacks = 0
        self._in_memory: tuple[Any, ...] | None = None  # the state of the last save, where a rollback may want it
        self._pending_in_memory: list[Pending] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._pending: Future[None] | None = None
        self._failures: list[Exception] = []  # of the last saves, if they failed

    def due(self, epoch_ended: bool) -> bool:
        """Whether to save after the step just done; StorageError if too many saves in a row have failed."""
        limit = self._config.max_failed_saves
        if limit is not None and len(self._failures) > limit:
            raise StorageError(
                f"{len(self._failures)} saves in a row failed, and checkpoint.max_failed_saves={limit}; the last: "
                f"{self._failures[-1]}. Put {self._store.storage.uri} right, and give the same command again"
            )
        progress = self._progress
        evaluated = any(each.step == progress.step for each in progress.pending)
        return self._cadence.due(progress.step, progress.epoch, epoch_ended, progress.finished, self.busy, evaluated)

    def stop(self) -> None:
        """Make the save that is due next the last; to be called on every rank."""
        self._cadence.stop()

    def _save_requested(self) -> bool:
        """Whether the driver has asked for a save since this was last asked."""
        requested, self._channel.save_requested = self._channel.save_requested, False
        return requested

    def _preemption_announced(self) -> bool:
        """Whether Ray tells of a node that is about to be taken away, and hadn't told before; collective."""
        if self._is_local:
            return False
        self._num_asked += 1
        # Ray's barrier here must not meet the one of a report in flight
        if self._num_asked % _ASKS_PER_PREEMPTION_POLL or not self._group.all_agree(not self.busy):
            return False
        info = ray.train.get_preemption_info()
        nodes = set(info.preempted_node_ids) if info is not None else set()
        new, self._leaving = nodes - self._leaving, nodes
        if new and info is not None and self._group.rank == 0:
            ranks, deadline_ms = info.preempted_ranks, info.deadline_ms
            notice = events.PreemptionNotice(self._progress.step, sorted(new), ranks, deadline_ms)
            self._channel.send(Happened(notice))
        return bool(new)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight on this rank."""
        return self._pending is not None and not self._pending.done()

    @property
    def stopping(self) -> bool:
        """Whether somebody wants the run to end after the save that is due now."""
        return self._cadence.stopping

    def save(self) -> None:
        """Copy the state and have it written; collective. Waits if the save before isn't done yet."""
        started = time.perf_counter()
        self.wait()
        progress = self._progress
        if not self._ledger_is_safe() or not self._is_worth_keeping():
            self._cadence.saved(progress.step)
            self._note_unsaved(progress.step, progress.epoch)
            return
        parts = self._copied_state()
        metrics = {"epoch": progress.epoch, "step": progress.step, **progress.metrics}
        if self._group.rank != 0:
            self._pending = self._thread.submit(ray.train.report, metrics)
        else:
            manifest = self._manifest()
            blocked_s = time.perf_counter() - started
            # told with the checkpoint, beside what it cost
            about = {"reasons": self._cadence.reasons, "blocked_s": round(blocked_s, 6)}
            saving = _Saving(
                manifest,
                parts,
                metrics,
                about,
                is_last=progress.finished or self.stopping,
                pending=tuple(progress.pending),
                best_step=progress.best.get("step"),
            )
            self._pending = self._thread.submit(self._write, saving)
        self._cadence.saved(progress.step)

    def _ledger_is_safe(self) -> bool:
        """Whether every rank's ledger holds what was done so far: no checkpoint may be ahead of it."""
        error = None
        if not self._has_ledger:
            return True
        try:
            self._ledger.flush()
        except OSError as caught:
            error = caught
        if self._group.all_agree(error is None):
            return True
        if self._group.rank == 0:
            self._failed(self._progress.step, error or OSError("another worker can't write its ledger"))
        return False

    def _copied_state(self) -> tuple[Any, ...]:
        """What a save writes, which later steps don't change; empty where nobody needs it. Collective."""
        extra, learner = self._extra.state_dict(), self._learner
        if lost := extra["progress"]["train"][3]:
            raise NonFiniteError(f"{lost} losses were NaN or infinite by step {self._progress.step}: nothing was saved")
        is_wanted = self._group.rank == 0 or self._keeps
        if not is_wanted and learner.sharding is None:
            return ()
        state = learner.full_state((learner.model.state_dict(), learner.optimizer.state_dict(), extra), keep=is_wanted)
        if not is_wanted:
            return ()
        parts: tuple[Any, ...] = self._staging.copy(state)
        if self._keeps:
            self._in_memory, self.num_rollbacks = parts, 0
            self._pending_in_memory = list(self._progress.pending)  # a state has no names of checkpoints
        return parts

    def _is_worth_keeping(self) -> bool:
        """Whether the weights are finite, where the copy in memory is what a rollback goes back to; collective."""
        if not self._keeps:
            return True  # asked beside the training, of the copy
        if self._group.all_agree(all(is_finite(local(each)) for each in self._learner.model.state_dict().values())):
            return True
        if self._group.rank == 0:
            self._failed(self._progress.step, CheckpointError(_NOT_FINITE))
        return False

    def keep_in_memory(self) -> None:
        """Let a rollback go back to here; collective."""
        if self._keeps:
            self._copied_state()

    def roll_back(self) -> None:
        """Go back to the state of the last save, without any process starting again."""
        assert self._in_memory is not None, "kept since the attempt began"
        # an optimiser takes the tensors that it is given for its own
        model, optimizer, extra = copy.deepcopy(self._in_memory)
        self._learner.load(model, optimizer)
        self._extra.load(extra, self._extra.versions(), "this run")
        self._progress.pending = list(self._pending_in_memory)
        self._ledger.back_to(self._progress.step)
        self.num_rollbacks += 1

    def wait(self) -> None:
        """Return when no save is in flight, on this rank."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def finish(self) -> None:
        """Wait for the last save; StorageError if it could not be written."""
        self.wait()
        self._thread.shutdown()
        if self._failures:
            error = self._failures[-1]
            raise StorageError(
                f"the last checkpoint could not be written: {error}. Put {self._store.storage.uri} right, and give "
                "the same command again"
            ) from error

    def restore(self, manifest: Manifest) -> None:
        """Load a verified checkpoint; StateError if its states are not the configured ones."""
        files = self._store.read(manifest)
        loaded = {name: load_part(name, content) for name, content in files.items()}
        try:
            self._learner.load(loaded[_MODEL], loaded[_OPTIMIZER])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {manifest.name}, of {manifest.written_by}, does not fit this model or optimiser: {error}"
            ) from error
        self._extra.load(loaded[_EXTRA], manifest.state_versions, manifest.written_by)
        self._cadence.saved(manifest.step)

    def _manifest(self) -> Manifest:
        run, progress = self._run, self._progress
        return Manifest(
            name=checkpoint_name(progress.step, run.attempt),
            step=progress.step,
            epoch=progress.epoch,
            position=progress.position,
            attempt=run.attempt,
            world_size=self._group.world_size,
            metrics=dict(progress.metrics),
            state_versions=self._extra.versions(),
            written_by=f"run '{run.name}' on {time.strftime('%Y-%m-%d %H:%M:%S')}",
            written_at=time.time(),
            versions=package_versions(),
            fingerprint=run.fingerprint,
        )

    def _write(self, saving: _Saving) -> None:
        """On the thread, rank 0 only: write, thin out, report to Ray. The other ranks wait in their report.

        Ray is not told of the checkpoint: it would write a snapshot of its own into the run directory, from its
        control loop, where a store that is down for a moment ends the run. The manifests say what there is.
        """
        manifest = saving.manifest
        is_good = all(is_finite(tensor) for tensor in saving.parts[0].values())
        if not is_good:
            self._failed(manifest.step, CheckpointError(_NOT_FINITE))
        for wait_s in (*(_LAST_TRIES_S if saving.is_last else ()), None) if is_good else ():
            try:
                self._write_once(saving)
                self._failures.clear()
                break
            except (OSError, CheckpointError) as error:
                self._failed(manifest.step, error)
                if wait_s is not None:
                    time.sleep(wait_s)
        else:
            self._note_unsaved(manifest.step, manifest.epoch)
        ray.train.report(saving.metrics)

    def _note_unsaved(self, step: int, epoch: int) -> None:
        """Let nobody wait for the evaluation of a checkpoint that there isn't."""
        name = checkpoint_name(step, self._run.attempt)
        unsaved = Evaluated(step, epoch, name, failure=UNSAVED, problem="its checkpoint was not saved")
        self._channel.note_evaluated(unsaved)

    def _failed(self, step: int, error: Exception) -> None:
        self._failures.append(error)
        self._channel.send(Happened(events.CheckpointFailed(step, str(error))))

    def _write_once(self, saving: _Saving) -> None:
        started, channel = time.perf_counter(), self._channel
        channel.sync()  # what was logged up to this step must be written down before the step counts as done
        saved = self._store.save(
            saving.manifest, {name: writer(part) for name, part in zip(FILES, saving.parts, strict=True)}
        )
        event = events.CheckpointSaved(
            step=saved.step,
            checkpoint=saved.name,
            bytes=saved.num_bytes,
            write_s=round(time.perf_counter() - started, 6),
            metrics=saved.metrics,
            **saving.about,
        )
        channel.send(Happened(event))
        for pending in saving.pending:
            if pending.checkpoint == saved.name:
                channel.send(EvaluateCheckpoint(**vars(pending)))
        with contextlib.suppress(OSError):  # an object store that is down now: the next save thins out
            manifests = self._store.manifests(lambda *_: None)
            self._store.delete_all_but(kept_names(manifests, self._config.num_to_keep, saving.steps_to_keep))


def _give_way() -> None:
    """Have this thread run where the training leaves a core idle; Linux knows priorities of threads.

    From the process's own on, which Ray has lowered: only root may raise one.
    """
    if sys.platform == "linux":
        lower = min(_LOWEST, os.getpriority(os.PRIO_PROCESS, 0) + _NICE)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lower)
