"""One optimiser step on a rank's share of a global batch; the training loop repeats it."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

from ftexp.config.schema import TrainConfig
from ftexp.data.batches import Batch, MicroBatch
from ftexp.data.order import derive_seed
from ftexp.evaluation.tasks import TASKS
from ftexp.failure.nonfinite import before_step, put_back
from ftexp.job.job import Job
from ftexp.job.learner import Learner
from ftexp.job.stopwatch import BACKWARD, FORWARD, OPTIMIZER, TEACHER
from ftexp.model.freezing import classifier_parameters
from ftexp.model.parallel.parts import whole
from ftexp.wire import events
from ftexp.wire.messages import Happened
from ftexp.worker.corruption import StepRepeat

_STEP = 3  # stream of the run's seed; see ftexp.job.build


def train_step(
    job: Job,
    batch: Batch,
    repeat: StepRepeat | None = None,
    recovers: Callable[[RuntimeError], bool] | None = None,
) -> bool:
    """Take one optimiser step on this rank's share of a global batch; return False if its gradient was NaN or infinite.

    After False, the state is what it was before the step. With failure.on_nonfinite=raise, gradients aren't checked
    here: the next logged point raises NonFiniteError. In fp16, a gradient that overflows at the current loss scale
    returns True: the scaler skips the step and lowers the scale, and `job.progress.num_overflows` counts it.

    repeat: computes the step twice if it is due, and compares the results.
    recovers: called after a RuntimeError; waits until a dead rank that may have caused it was replaced, and returns
        False if none was.
    """
    learner, meter = job.learner, job.progress.train
    micro_batches = [job.data.augmented(micro, batch.start) for micro in batch.micro_batches]
    repeats = repeat if repeat is not None and repeat.is_due else None
    may_undo = recovers is not None or repeats is not None or _looks(job)
    while True:
        before = before_step(learner, meter) if may_undo else []
        try:
            return _take_step(job, micro_batches, before, repeats, shares=recovers is not None)
        except RuntimeError as error:
            if recovers is None:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold DDP, whose hooks would react to later gradients
            put_back(learner, meter, before)
            if not recovers(error):
                raise


def _looks(job: Job) -> bool:
    """Return whether each step is checked for non-finite gradients."""
    return job.config.failure.on_nonfinite != "raise"


def _take_step(
    job: Job, micro_batches: Sequence[MicroBatch], before: list[Tensor], repeat: StepRepeat | None, shares: bool
) -> bool:
    """Take the step of `train_step`, once the batch is prepared.

    before: the state for `put_back`; empty if nothing may undo the step. `put_back` restores everything that changes
        before the last collective, which shares the sums of metrics.
    repeat: compares the step with a second computation; None: it is computed once.
    shares: whether every rank keeps the sums of metrics of all ranks, for a replacement.
    """
    learner, meter = job.learner, job.progress.train
    _seed_step(job)
    looks, scale = _looks(job), learner.scaler.get_scale()
    losses = _gradients(job, micro_batches)
    if repeat is not None:
        losses = repeat.compare(losses, lambda: _gradients_again(job, micro_batches, before))
    norm = _gradient_norm(learner) if looks and not learner.scaler.is_enabled() else None
    if looks and not _is_finite(job, losses, norm):
        put_back(learner, meter, before)
        return False
    if shares:
        meter.share()
    _clip(learner, job.config.train, norm)
    learner.before_change()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if learner.scaler.get_scale() < scale:
        job.progress.num_overflows += 1
    elif learner.ema is not None:
        learner.ema.update(learner.model, job.progress.step + 1)
    job.stopwatch.lap(OPTIMIZER)
    return True


def _gradients(job: Job, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor]:
    """Compute the gradient of a step; return the losses of each micro-batch."""
    learner, losses = job.learner, []
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.sharding is not None:
        job.stopwatch.wait()  # this rank waits until rank 0's buffers arrive
        learner.sharding.begin_step(learner.model)
        job.stopwatch.go_on()
    for number, micro in enumerate(micro_batches):
        with _gradient_sync(learner, is_last=number == len(micro_batches) - 1):
            losses.append(_forward_backward(job, micro))
    return losses


def _gradients_again(job: Job, micro_batches: Sequence[MicroBatch], before: list[Tensor]) -> Sequence[Tensor]:
    """Repeat `_gradients` from the same state."""
    put_back(job.learner, job.progress.train, before)
    _seed_step(job)
    return _gradients(job, micro_batches)


def _seed_step(job: Job) -> None:
    """Seed torch, numpy and Python for the next step, by (seed, step, rank) alone."""
    seed = derive_seed(job.config.seed, _STEP, job.progress.step, job.group.rank) % 2**63
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every backend, which takes longer
    if job.group.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _forward_backward(job: Job, micro: MicroBatch) -> Tensor:
    """Add the gradient of a micro-batch; return its losses, [rows]."""
    learner, distiller = job.learner, job.learner.distiller
    if distiller is not None:
        answers = distiller.answers(micro.images)
        job.stopwatch.lap(TEACHER)
    logits, compared = learner.forward(micro.images)
    targets = micro.labels if micro.targets is None else micro.targets
    losses = learner.loss(logits.float(), targets)
    if distiller is not None:
        losses = distiller.losses(losses, compared, answers)
    job.stopwatch.lap(FORWARD)
    learner.scaler.scale((losses * micro.weights).sum()).backward()  # type: ignore[no-untyped-call]
    job.progress.train.add(losses, TASKS[job.info.task].right(logits[:: job.data.splits], targets), micro.weights > 0)
    job.stopwatch.lap(BACKWARD)
    return losses.detach()


def _is_finite(job: Job, losses: Sequence[Tensor], norm: Tensor | None) -> bool:
    """Return whether the gradient is finite, in fp16 the losses; the same on every rank, collective.

    norm: norm of the gradient; None in fp16.
    """
    if norm is None:
        # the scaler handles an overflowing gradient; no scale makes a non-finite loss finite
        return job.group.all_agree(bool(torch.isfinite(torch.cat(list(losses))).all()))
    # gradients are summed over ranks: if they aren't finite on one rank, they are finite on none
    return bool(torch.isfinite(norm))


def _gradient_norm(learner: Learner) -> Tensor:
    gradients = [parameter.grad for parameter in learner.trainable.parameters() if parameter.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def _clip(learner: Learner, config: TrainConfig, norm: Tensor | None) -> None:
    """Clip gradients as configured, if at all. `norm`: norm of all gradients; None if it isn't known yet."""
    if config.clip_grad_norm is None and config.clip_grad_value is None and config.clip_grad_agc is None:
        return
    learner.scaler.unscale_(learner.optimizer)
    if config.clip_grad_norm is not None:
        norm = _gradient_norm(learner) if norm is None else norm
        torch.nn.utils.clip_grads_with_norm_(learner.trainable.parameters(), config.clip_grad_norm, norm)
    elif config.clip_grad_value is not None:
        torch.nn.utils.clip_grad_value_(learner.trainable.parameters(), config.clip_grad_value)
    else:
        names = classifier_parameters(learner.model)
        head = {id(parameter) for name, parameter in learner.model.named_parameters() if name in names}
        body = [parameter for parameter in learner.trainable.parameters() if id(parameter) not in head]
        adaptive_clip_grad(body, config.clip_grad_agc)


def _gradient_sync(learner: Learner, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """Let ranks reduce gradients only in the last micro-batch of a step: with DDP, and replicas of a sharded model."""
    if learner.sharding is not None:
        learner.sharding.sync_replicas(learner.model, is_last=is_last)
    if is_last or not isinstance(learner.wrapped, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return learner.wrapped.no_sync()


def thaw(job: Job) -> bool:
    """Freeze and unfreeze parameters as the epoch requires; return whether any changed. Collective if so."""
    learner, progress = job.learner, job.progress
    if not learner.thaw(progress.epoch):
        return False
    settle_gradient_order(job)
    job.utilisation.restart_count()
    if job.group.rank == 0:
        job.channel.send(Happened(events.Thawed(progress.epoch, learner.freezing.num_frozen)))
    return True


def settle_gradient_order(job: Job) -> None:
    """Make DDP rebuild its buckets before the first step, by a backward pass that is undone; collective.

    DDP rebuilds them after an attempt's first backward pass. This moves gradients within the buffers that are summed
    over ranks. With three or more ranks, it changes the order of addition: the first step of a resumed attempt would be
    rounded differently from the same step of an uninterrupted run. FSDP2's layout depends on the model alone.
    """
    if job.group.world_size < 3 or job.learner.sharding is not None:  # of two, a + b equals b + a
        return
    learner, meter = job.learner, job.progress.train
    before = before_step(learner, meter)
    shape = (2, job.info.channels, job.info.image_size, job.info.image_size)
    logits, compared = learner.forward(torch.zeros(shape, device=job.group.device))
    total = logits.float().sum()
    if compared is not logits:
        total = total + compared.float().sum()
    total.backward()  # type: ignore[no-untyped-call]
    put_back(learner, meter, before)
