"""Validation while a run trains: by the workers themselves, or besides them, from checkpoints."""

from __future__ import annotations

import dataclasses

from ftexp.checkpoint.manifest import Manifest, checkpoint_name
from ftexp.checkpoint.store import CheckpointStore
from ftexp.config.schema import BESIDE
from ftexp.errors import CheckpointError
from ftexp.job.job import Job
from ftexp.job.progress import Pending
from ftexp.wire import events
from ftexp.wire.messages import DAMAGED, FAILED, EvaluateCheckpoint, Evaluated, Happened
from ftexp.worker.evaluation import evaluate


def validate(job: Job) -> bool:
    """Evaluate the step just done, or have its checkpoint evaluated; collective.

    The result of the evaluation before is waited for then: what follows from it (the best checkpoint) follows one
    evaluation later, at the same step whatever the evaluation takes, so that a run is the same bits after a failure.
    False if the run was asked to stop before the result came: then this step must be its last.
    """
    progress = job.progress
    is_settled = settle(job)  # also where evaluation was besides training before the run was resumed
    if job.config.train.eval == BESIDE and len(job.data.rows["val"]):
        name = checkpoint_name(progress.step, job.run.attempt)
        progress.pending.append(Pending(progress.step, progress.epoch, name))
        return is_settled
    evaluate(job, "val")
    _evaluated(job, progress.step, progress.epoch)
    return is_settled


def ask_again(job: Job, store: CheckpointStore) -> None:
    """Have evaluated what a restored run still waits for: the driver may be another by now. Collective."""
    progress = job.progress
    if not progress.pending:
        return
    names = {each.step: each.name for each in _oldest_first(store)} if job.group.rank == 0 else {}
    names = job.group.agree_on(names)
    progress.pending = [
        dataclasses.replace(each, checkpoint=names.get(each.step, checkpoint_name(each.step, 0)))
        for each in progress.pending
    ]
    for pending in progress.pending if job.group.rank == 0 else ():
        job.channel.send(EvaluateCheckpoint(**vars(pending)))


def _oldest_first(store: CheckpointStore) -> list[Manifest]:
    return sorted(store.manifests(lambda *_: None), key=lambda each: (each.step, each.attempt))


def settle(job: Job, max_pending: int = 0) -> bool:
    """Wait for the evaluations that are pending, the oldest first, and take in their results; collective.

    Args:
        job: the run.
        max_pending: how many may stay pending.

    Returns:
        False if the run was asked to stop meanwhile, and more than that stay pending.
    """
    progress = job.progress
    while len(progress.pending) > max_pending:
        first = progress.pending[0]
        found = job.group.agree_on(job.channel.evaluated(first.checkpoint) if job.group.rank == 0 else None)
        if found is None:
            return False
        _take_in(job, found)
        del progress.pending[0]
    return True


def _take_in(job: Job, found: Evaluated) -> None:
    """Add an evaluation to what the run knows; the driver has logged it.

    Raises:
        CheckpointError: the checkpoint is corrupt, though this attempt saved it: the run has to resume from the one
            before. Of an earlier attempt's, what was restored is newer, so that its metrics are lost.
        RuntimeError: the evaluation failed.
    """
    of_this_attempt = found.checkpoint == checkpoint_name(found.step, job.run.attempt)
    if found.failure is None:
        job.progress.metrics.update(found.values)
        _evaluated(job, found.step, found.epoch)
    elif found.failure == FAILED:
        raise RuntimeError(f"evaluation of checkpoint {found.checkpoint} failed: {found.problem}")
    elif found.failure == DAMAGED and of_this_attempt:
        raise CheckpointError(f"checkpoint {found.checkpoint} could not be evaluated: {found.problem}")
    elif job.group.rank == 0:
        job.channel.send(Happened(events.EvaluationFailed(found.step, found.problem)))


def _evaluated(job: Job, step: int, epoch: int) -> None:
    """Do what follows from the metrics of a step; collective."""
    saving = job.config.checkpoint
    job.progress.update_best(saving.checkpoint_score_attribute, saving.checkpoint_score_order, step)
    job.hooks.after_evaluation(step, epoch)
