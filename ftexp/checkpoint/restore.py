"""Where an attempt starts from. Rank 0 decides, and every rank loads what it decided."""

from __future__ import annotations

import time

from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.staging import load_part
from ftexp.checkpoint.store import CheckpointStore, Manifest, locate
from ftexp.config.fingerprint import differences
from ftexp.job.job import Job
from ftexp.model.build import initialise_head, timm_arguments
from ftexp.model.matching import load_matching
from ftexp.model.timm_private import checkpoint_filter
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.channel import Channel
from ftexp.wire.messages import Happened


def restore(job: Job, store: CheckpointStore, checkpoints: CheckpointManager) -> None:
    """Go to the latest checkpoint that verifies; collective. Without one, start from `resume_from`, or as built.

    What doesn't verify is quarantined and told; ConfigError if the checkpoint is that of another run.
    """
    started = time.perf_counter()
    name, num_rejected = job.group.agree_on(_choose(job.channel, store) if job.group.rank == 0 else None)
    if name is None:
        if job.config.resume_from is not None:
            _start_from(job, job.config.resume_from)
            checkpoints.save()  # a restart must not depend on the other run's checkpoints, which may go
        return
    manifest = store.by_name(name)
    differences(manifest.fingerprint, job.run.fingerprint, f"{store.storage.uri}/{name}")
    checkpoints.restore(manifest)
    if job.group.rank == 0:
        seconds = round(time.perf_counter() - started, 3)
        job.channel.send(
            Happened(events.Restored(num_rejected, seconds, name, job.progress.step, job.progress.position))
        )


def _choose(channel: Channel, store: CheckpointStore) -> tuple[str | None, int]:
    """The name of the checkpoint to load, and how many were rejected on the way."""
    for name in store.storage.sweep():
        channel.send(Happened(events.Swept(name)))
    rejected: dict[str, str] = {}
    chosen = store.latest(rejected.__setitem__)
    for name, reason in rejected.items():
        try:
            store.quarantine(name)
        except OSError as error:  # it stays, and is rejected again next time
            reason = f"{reason}; it can't be moved away: {error}"
        channel.send(Happened(events.CheckpointRejected(name, reason)))
    return chosen.name if chosen else None, len(rejected)


def _start_from(job: Job, uri: str) -> None:
    """Load the weights of another run's checkpoint into the model: what fits, with a report of the rest; collective."""
    group, learner = job.group, job.learner
    found = locate(uri) if group.rank == 0 else None  # of a run that trains on, another rank might find a newer one
    where, name = group.agree_on(found and (found[0].storage.uri, found[1].name))
    store = CheckpointStore(Storage.at(where))
    manifest = store.by_name(name)
    weights = load_part("model.pt", store.read_file(manifest, "model.pt"))
    filter_fn = checkpoint_filter(timm_arguments(job.config.model, job.info))
    source = _described(store, manifest)
    learner.weights_report = load_matching(learner.model, weights, source, "resume_from", filter_fn)
    initialise_head(learner.model, job.config.model, learner.weights_report.matched)  # what is new was so when built
    if learner.ema is not None:
        learner.ema.begin_at(learner.model)


def _described(store: CheckpointStore, manifest: Manifest) -> str:
    return f"{store.storage.child(manifest.name).uri} (step {manifest.step})"
