"""Validation during training: by the workers themselves, or of checkpoints, while the workers continue."""

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

    First, wait for the result of the previous evaluation. Its consequences, such as the best checkpoint, thus always
    follow one evaluation later, at the same step however long the evaluation takes. So a run stays bitwise identical
    after a failure.

    Return False if a stop was requested before the result came: this step must then be the last.
    """
    progress = job.progress
    is_settled = settle(job)  # also with train.eval=inline: evaluations of train.eval=beside may be pending
    if job.config.train.eval == BESIDE and len(job.data.rows["val"]):
        name = checkpoint_name(progress.step, job.run.attempt)
        progress.pending.append(Pending(progress.step, progress.epoch, name))
        return is_settled
    evaluate(job, "val")
    _evaluated(job, progress.step, progress.epoch)
    return is_settled


def ask_again(job: Job, store: CheckpointStore) -> None:
    """Request the pending evaluations of a restored run again, since the driver may be a new process; collective."""
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
    """Wait for pending evaluations, oldest first, and apply their results; collective.

    Args:
        job: the run.
        max_pending: number of evaluations that may stay pending.

    Returns:
        False if a stop was requested meanwhile and more than `max_pending` stay pending.
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
    """Apply the result of an evaluation; the driver has logged it.

    If the checkpoint was not saved, or is a bad one of an earlier attempt, only its metrics are lost: the run doesn't
    resume from it.

    Raises:
        CheckpointError: a checkpoint of this attempt is missing or corrupt; the run has to resume from the one before.
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
    """Update the best metrics and call the hooks, for the evaluation of `step`; collective."""
    saving = job.config.checkpoint
    job.progress.update_best(saving.checkpoint_score_attribute, saving.checkpoint_score_order, step)
    job.hooks.after_evaluation(step, epoch)
