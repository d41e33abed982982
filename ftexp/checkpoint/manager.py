"""Saving and restoring on one rank: when to save, what to save, what to resume from.

Training waits only while the state is copied, or a part of it if the model is sharded. The rest runs in the background:
see ftexp.checkpoint.writing.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import ray.train

from ftexp.checkpoint.cadence import Cadence
from ftexp.checkpoint.manifest import EXTRA, FILES, MANIFEST, MODEL, OPTIMIZER, Manifest, checkpoint_name, sha256_of
from ftexp.checkpoint.memory.packing import own
from ftexp.checkpoint.memory.restoring import SnapshotReader
from ftexp.checkpoint.memory.snapshots import Snapshots
from ftexp.checkpoint.reading import cut, read_parts
from ftexp.checkpoint.registry import ExtraState
from ftexp.checkpoint.sharding import Like, Place, common_place, gathered, joined, like_parameters, like_tree
from ftexp.checkpoint.staging import Staging, is_finite
from ftexp.checkpoint.store import CheckpointStore
from ftexp.checkpoint.writing import NOT_FINITE, CheckpointWriter, Saving
from ftexp.config.versions import package_versions
from ftexp.counting import counted
from ftexp.errors import CheckpointError, ConfigError, NonFiniteError, StorageError
from ftexp.model.parallel.parts import local
from ftexp.wire import events
from ftexp.wire.messages import Happened

if TYPE_CHECKING:
    from ftexp.checkpoint.memory.keeper import Links
    from ftexp.config.schema import Config
    from ftexp.job.group import ProcessGroup
    from ftexp.job.job import RunIdentity
    from ftexp.job.learner import Learner
    from ftexp.job.progress import Pending, Progress
    from ftexp.rundir.sample_ledger import SampleLedger
    from ftexp.wire.channel import Channel

_ASKS_PER_PREEMPTION_POLL = 3  # the cadence asks about once a second; a poll costs 30 ms


class CheckpointManager:
    """Saves and restores one rank's part of a run. Its methods are called by every rank at the same steps.

    `num_rollbacks`: rollbacks to the copy in memory since that copy was made.
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
        links: Links | None = None,
    ) -> None:
        self._run, self._group, self._learner, self._progress = run, group, learner, progress
        self._ledger, self._channel, self._store, self._extra = ledger, channel, store, extra
        self._config = config.checkpoint
        self._is_local = config.scaling.address is None  # a local Ray dies with its machine
        self._has_ledger = config.train.ledger
        self._keeps = config.failure.on_nonfinite == "rollback"  # every rank keeps the last saved state in memory
        self._cadence = Cadence(
            self._config,
            group.agree,
            stop_requested=lambda: channel.stop_requested,
            machine_goes=self._preemption_announced,
            save_requested=self._save_requested,
        )
        self._num_asked = 0
        self._leaving: set[str] = set()  # nodes whose preemption was announced
        self._staging = Staging(group.device)
        self.num_rollbacks = 0
        self._in_memory: dict[str, Any] | None = None  # state of the last checkpoint, if `_keeps`
        self._pending_in_memory: list[Pending] = []
        sharded = common_place(learner.model.state_dict())
        if self._config.format == "sharded" and sharded is None:
            raise ConfigError(
                "checkpoint.format=sharded, and the model's parameters are not sharded: take parallel=fsdp or hsdp, or "
                "checkpoint.format=auto"
            )
        self._is_cut = sharded is not None  # whether the tensors of the learner are sharded
        self._place = sharded if self._config.format != "full" else None
        is_sharded, timeout_s = self._place is not None, config.failure.save_timeout_s
        self._writer = CheckpointWriter(self._config, group, channel, store, is_sharded, timeout_s)
        learner.before_change = self._staging.settle
        self._links, self._cut_place, self._failure = links, sharded, config.failure
        self._snapshots: Snapshots | None = None

    def due(self, epoch_ended: bool) -> bool:
        """Return whether to save after the last step; StorageError or NonFiniteError if too many saves have failed."""
        limit, failures = self._config.max_failed_saves, self._writer.failures
        if limit is not None and len(failures) > limit:
            if isinstance(failures[-1], NonFiniteError):
                raise failures[-1]
            raise StorageError(
                f"{counted(len(failures), 'checkpoint')} in a row could not be saved, and "
                f"checkpoint.max_failed_saves={limit}; "
                f"the last error: {failures[-1]}. Fix {self._store.storage.uri}, then run the same command again"
            )
        progress = self._progress
        evaluated = any(each.step == progress.step for each in progress.pending)
        return self._cadence.due(progress.step, progress.epoch, epoch_ended, progress.finished, self.busy, evaluated)

    def stop(self) -> None:
        """Make the next call of `due` return True, for a last checkpoint; to be called on every rank."""
        self._cadence.stop()

    def _save_requested(self) -> bool:
        """Return whether the driver has requested a checkpoint since the last call."""
        requested, self._channel.save_requested = self._channel.save_requested, False
        return requested

    def _preemption_announced(self) -> bool:
        """Return whether Ray announces a node's preemption for the first time; collective."""
        if self._is_local:
            return False
        self._num_asked += 1
        # get_preemption_info() is a barrier, which must not overlap with the barrier of a report in flight
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
        """Whether a checkpoint is in flight on this rank."""
        return self._writer.busy

    @property
    def stopping(self) -> bool:
        """Whether the run is to end after the checkpoint that is due now."""
        return self._cadence.stopping

    def save(self) -> None:
        """Copy the state and start writing it; collective. Waits for the previous checkpoint."""
        started = time.perf_counter()
        self.wait()
        progress = self._progress
        manifest = self._manifest()
        if not self._ledger_is_safe() or not self._is_worth_keeping():
            self._cadence.saved(progress.step)
            self._writer.note_unsaved(manifest)
            return
        parts = self._copied_state()
        # reported with the checkpoint
        about = {"reasons": self._cadence.reasons, "blocked_s": round(time.perf_counter() - started, 6)}
        saving = Saving(
            manifest,
            parts,
            self._place,
            {"epoch": progress.epoch, "step": progress.step, **progress.metrics},
            about,
            is_last=progress.finished or self.stopping,
            is_end=progress.finished,
            pending=tuple(progress.pending),
            best_step=progress.best.get("step"),
        )
        self._writer.begin(saving)
        self._cadence.saved(progress.step)

    def begin_snapshots(self) -> None:
        """Start taking snapshots, if this run takes any, and measure their cost again; collective."""
        self.close()
        if self._links is not None:
            self._snapshots = Snapshots(self._failure, self._group, self._channel, self._links, self._cut_place)

    def snapshot_due(self) -> bool:
        """Return whether to take a snapshot after the last step: never of a step that is saved. Collective."""
        if self._snapshots is None or self._progress.finished:
            return False
        return self._snapshots.due(self._progress.step, self.busy or bool(self._cadence.reasons) or self.stopping)

    def take_snapshot(self, began: float) -> None:
        """Copy the state into memory that outlives the workers; collective.

        began: time at which training began to wait, by time.perf_counter.
        """
        assert self._snapshots is not None, "it was due"
        run, step = self._run, self._progress.step
        try:
            self._flush_ledger()
            state = self._state(self._snapshots.writes)
        except (OSError, NonFiniteError):  # the state isn't worth keeping; a checkpoint would report the error
            self._snapshots.leave_out(step)
            return
        facts = {"run": run.name, "fingerprint": sha256_of(run.fingerprint), "step": step, "attempt": run.attempt}
        self._snapshots.take(step, {**state, MANIFEST: vars(self._manifest())}, facts, began)

    @property
    def may_have_snapshots(self) -> bool:
        """Whether earlier attempts may have left snapshots that the run descends from."""
        return self._links is not None and bool(self._run.lineage)

    def restore_snapshot(self, newest: Manifest | None) -> Manifest | None:
        """Load the newest snapshot that every rank can read, unless `newest` has a higher step; collective.

        newest: newest checkpoint in storage.
        Returns the snapshot's manifest; None if no snapshot was loaded. Errors: as of `restore`.
        """
        assert self._links is not None, "where there may be some"
        run, lineage = self._run, self._run.lineage
        reader = SnapshotReader(self._links, self._group, self._cut_place)
        reader.find()
        min_step = newest.step if newest is not None else 0
        found = reader.read(lineage, run.name, sha256_of(run.fingerprint), min_step)
        if found is None:
            return None
        choice, state = found
        likes = self._likes()
        join = joined if reader.lies_alike(choice) else cut
        # copied, since an optimiser or a state may keep the tensors that it loads
        parts = {name: part if name == MODEL else own(part) for name, part in state.items() if name in FILES}
        manifest = Manifest(**state[MANIFEST])
        self._load({name: join(part, likes[name]) if likes else part for name, part in parts.items()}, manifest)
        saved_s_ago = time.time() - newest.written_at if newest is not None else 0.0
        self._cadence.resumed(manifest.step, max(0.0, saved_s_ago))
        return manifest

    def _ledger_is_safe(self) -> bool:
        """Flush every rank's sample ledger, since no checkpoint may be ahead of it; False if one fails. Collective."""
        try:
            self._flush_ledger()
        except OSError as error:
            self._writer.note_failed(self._progress.step, error)
            return False
        return True

    def _flush_ledger(self) -> None:
        """Flush every rank's sample ledger; OSError on every rank if one fails. Collective."""
        error = None
        if not self._has_ledger:
            return
        try:
            self._ledger.flush()
        except OSError as caught:
            error = caught
        if not self._group.all_agree(error is None):
            raise error or OSError("another worker can't write its ledger")

    def _copied_state(self) -> dict[str, Any]:
        """Return the content that this rank writes, {name: content}, safe from later steps; collective."""
        state, parts = self._state(), dict[str, Any]()
        if self._keeps:
            parts = self._in_memory = self._staging.copy(state)
            self.num_rollbacks = 0
            self._pending_in_memory = list(self._progress.pending)  # with checkpoint names, which the state lacks
        if self._is_cut and self._place is None:
            parts = gathered(state, self._writes)
        elif self._writes and not self._keeps:
            parts = self._staging.defer(state)
        return parts if self._writes else {}

    def _state(self, is_wanted: bool = True) -> dict[str, Any]:
        """Return the live state, {name of FILES: content}; NonFiniteError after non-finite losses. Collective.

        is_wanted: whether this rank needs it; if not, {} is returned.
        """
        extra, learner = self._extra.state_dict(), self._learner
        if lost := extra["progress"]["train"][3]:
            raise NonFiniteError(f"{lost} losses were NaN or infinite by step {self._progress.step}: nothing was saved")
        if not is_wanted:
            return {}
        return {MODEL: learner.model.state_dict(), OPTIMIZER: learner.optimizer.state_dict(), EXTRA: extra}

    @property
    def _writes(self) -> bool:
        """Whether this rank writes a part of a checkpoint."""
        return self._group.rank == 0 if self._place is None else self._place.is_first_replica

    def _is_worth_keeping(self) -> bool:
        """Return whether the weights are finite; checked only if rollbacks use the copy in memory. Collective."""
        if not self._keeps:
            return True  # the writing thread checks the copy
        if self._group.all_agree(all(is_finite(local(each)) for each in self._learner.model.state_dict().values())):
            return True
        self._writer.note_failed(self._progress.step, NonFiniteError(NOT_FINITE))
        return False

    def keep_in_memory(self) -> None:
        """Keep the current state for rollbacks, if they are configured; collective."""
        if self._keeps:
            self._copied_state()

    def roll_back(self) -> None:
        """Restore the last checkpoint's state from memory; no process restarts."""
        assert self._in_memory is not None, "kept since the attempt began"
        # copied, since an optimiser keeps the tensors that it loads
        kept, likes = copy.deepcopy(self._in_memory), self._likes()
        parts = {name: joined(part, likes[name]) if likes else part for name, part in kept.items()}
        self._take(parts)
        self._progress.pending = list(self._pending_in_memory)
        self._ledger.back_to(self._progress.step)
        self.num_rollbacks += 1

    @property
    def is_idle(self) -> bool:
        """Whether no checkpoint is in flight on this rank, and none is due."""
        return not self.busy and not self._cadence.reasons

    def hand_over(self, facts: Any) -> None:
        """Send the state and `facts` to a rank that calls `take_over`; collective with it."""
        state = self._state(self._group.rank == 0)
        self._group.agree_on((state, facts))

    def take_over(self) -> Any:
        """Load the state that the other ranks hand over; returns rank 0's facts. Collective."""
        self._extra.state_dict()  # takes part in the other ranks' call, which may sum over ranks
        state, facts = self._group.agree_on(None)
        self._take(state)
        return facts

    def _take(self, parts: dict[str, Any]) -> None:
        """Load a state of this run; what loads it may keep its tensors."""
        self._learner.model.load_state_dict(parts[MODEL])
        self._learner.optimizer.load_state_dict(parts[OPTIMIZER])
        self._extra.load(parts[EXTRA], self._extra.versions(), "this run")

    def rejoin(self) -> None:
        """Restart cadence and snapshots on every rank, since one of the ranks has just started; collective."""
        self._cadence.rejoin(self._progress.step)
        self._num_asked = 0
        self.begin_snapshots()

    def _likes(self) -> dict[str, Like]:
        """Return the learner's DTensors, by part; empty if it has none. Collective."""
        if not self._is_cut:
            return {}
        return {
            MODEL: like_tree(self._learner.model.state_dict()),
            OPTIMIZER: like_parameters(self._learner.optimizer),
            EXTRA: like_tree(self._extra.state_dict()),
        }

    def wait(self) -> None:
        """Wait until no checkpoint is in flight on this rank."""
        self._writer.wait()

    def finish(self) -> None:
        """Wait for the last checkpoint; StorageError if it could not be written, NonFiniteError if it is not finite."""
        self._writer.close()
        self.close()
        if self._writer.failures:
            error = self._writer.failures[-1]
            if isinstance(error, NonFiniteError):  # not a failure of the storage
                raise error
            raise StorageError(
                f"the last checkpoint could not be written: {error}. Fix {self._store.storage.uri}, then run the same "
                "command again"
            ) from error

    def close(self) -> None:
        """Stop taking snapshots."""
        if self._snapshots is not None:
            self._snapshots.close()

    def restore(self, manifest: Manifest) -> str | None:
        """Load a checkpoint; collective. If it is rejected, return the reason and change nothing; else return None.

        Each rank reads what it needs, and verifies what it reads.

        Raises:
            StateError: its states are not the configured ones.
            CheckpointError: it was saved from another model or optimiser.
        """
        loaded, problem = dict[str, Any](), None
        try:
            loaded = read_parts(self._store, manifest, FILES, self._likes())
        except CheckpointError as error:
            problem = str(error)
        if (found := self._group.any_of(problem)) is not None:
            return found
        self._load(loaded, manifest)
        self._cadence.saved(manifest.step)
        return None

    def _load(self, loaded: dict[str, Any], manifest: Manifest) -> None:
        """Load a checkpoint's content; errors as of `restore`."""
        try:
            self._learner.model.load_state_dict(loaded[MODEL])
            self._learner.optimizer.load_state_dict(loaded[OPTIMIZER])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {manifest.name}, of {manifest.written_by}, does not fit this model or optimiser: {error}"
            ) from error
        self._extra.load(loaded[EXTRA], manifest.state_versions, manifest.written_by)

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
            mesh=_described(self._place),
        )


def _described(place: Place | None) -> dict[str, Any] | None:
    """Return the manifest's entry for the mesh that writes a sharded checkpoint."""
    return None if place is None else {"dims": place.dims, "num_shards": place.num_shards}
