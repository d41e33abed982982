"""The state that an attempt starts from: rank 0 chooses it, and every rank loads it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.manifest import Manifest
from ftexp.checkpoint.reading import read_weights
from ftexp.checkpoint.store import CheckpointStore, locate
from ftexp.config.fingerprint import differences
from ftexp.job.job import Job
from ftexp.model.build import initialise_head, timm_arguments
from ftexp.model.matching import load_matching
from ftexp.model.timm_private import checkpoint_filter
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.channel import Channel
from ftexp.wire.messages import MEMORY, START, STORAGE, Happened


def restore(job: Job, store: CheckpointStore, checkpoints: CheckpointManager) -> str:
    """Load the newest snapshot in memory, or the newest checkpoint that verifies if it is newer; collective.

    Without either, start from `resume_from` or from the initial weights. Checkpoints that don't verify are quarantined
    and reported; ConfigError if a checkpoint's run has a different configuration.

    Returns the source of the state: MEMORY, STORAGE or START.
    """
    started = time.perf_counter()
    rejections = _Rejections(job.channel, store)
    if (snapshot := _from_memory(job, store, checkpoints)) is not None:
        _announce(job, 0, time.perf_counter() - started, snapshot.name, MEMORY)
        return MEMORY
    candidates = _candidates(job.channel, store, rejections) if job.group.rank == 0 else iter(())
    while (name := job.group.agree_on(next(candidates, None))) is not None:
        manifest = store.by_name(name)
        differences(manifest.fingerprint, job.run.fingerprint, f"{store.storage.uri}/{name}")
        if (problem := checkpoints.restore(manifest)) is None:
            break
        if job.group.rank == 0:
            rejections.add(name, problem)
    if name is None and job.config.resume_from is not None:
        _start_from(job, job.config.resume_from)
        checkpoints.save()  # so that a restart doesn't need the checkpoints of the other run, which may be removed
    if name is None:
        return START
    _announce(job, rejections.count, time.perf_counter() - started, name, STORAGE)
    return STORAGE


def _from_memory(job: Job, store: CheckpointStore, checkpoints: CheckpointManager) -> Manifest | None:
    """Load the newest snapshot in memory, unless storage has a newer checkpoint; returns its manifest. Collective."""
    if not checkpoints.may_have_snapshots:
        return None
    newest = next(iter(store.manifests(lambda *_: None)), None) if job.group.rank == 0 else None
    found = checkpoints.restore_snapshot(job.group.agree_on(newest))
    if found is not None and job.group.rank == 0:
        _sweep(job.channel, store)
    return found


def _announce(job: Job, num_rejected: int, seconds: float, name: str, source: str) -> None:
    if job.group.rank == 0:
        place = (name, job.progress.step, job.progress.position)
        job.channel.send(Happened(events.Restored(num_rejected, round(seconds, 3), *place, source)))


class _Rejections:
    """Moves rejected checkpoints to quarantine, reports and counts them."""

    def __init__(self, channel: Channel, store: CheckpointStore) -> None:
        self._channel, self._store, self.count = channel, store, 0

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        try:
            self._store.quarantine(name)
        except OSError as error:  # it stays, and is rejected again next time
            reason = f"{reason}; it can't be moved away: {error}"
        self._channel.send(Happened(events.CheckpointRejected(name, reason)))


def _sweep(channel: Channel, store: CheckpointStore) -> None:
    for name in store.storage.sweep():
        channel.send(Happened(events.Swept(name)))


def _candidates(channel: Channel, store: CheckpointStore, rejections: _Rejections) -> Iterator[str]:
    """Yield the names of the checkpoints to try, the newest first; each rank verifies what it reads of sharded ones."""
    _sweep(channel, store)
    for manifest in store.candidates(rejections.add):
        yield manifest.name


def _start_from(job: Job, uri: str) -> None:
    """Load the fitting weights of another run's checkpoint into the model, and report the rest; collective."""
    group, learner = job.group, job.learner
    found = locate(uri) if group.rank == 0 else None  # other ranks might find newer ones if that run still trains
    where, name = group.agree_on(found and (found[0].storage.uri, found[1].name))
    store = CheckpointStore(Storage.at(where))
    manifest = store.by_name(name)
    weights = read_weights(store, manifest, "raw")
    filter_fn = checkpoint_filter(timm_arguments(job.config.model, job.info))
    source = _described(store, manifest)
    learner.weights_report = load_matching(learner.model, weights, source, "resume_from", filter_fn)
    # tensors that weren't loaded were initialised when the model was built
    initialise_head(learner.model, job.config.model, learner.weights_report.matched)
    if learner.ema is not None:
        learner.ema.begin_at(learner.model)


def _described(store: CheckpointStore, manifest: Manifest) -> str:
    return f"{store.storage.child(manifest.name).uri} (step {manifest.step})"
