"""One optimiser step on a rank's share of a global batch: what the loop repeats."""

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
    """One optimiser step on this rank's share of a global batch; False if its gradient was NaN or infinite.

    If failure.on_nonfinite is not "raise", the state is then what it was before; else the next logged point raises.
    In fp16 a gradient that is too large for the loss scale is none of that: the scaler leaves the step out, lowers the
    scale, and `job.progress.num_overflows` counts it.
    recovers: waits until a rank that has died is back, whose death may have given the error; False if none has died.
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
            traceback.clear_frames(error.__traceback__)  # DDP, which they hold, would hear of the gradients that follow
            put_back(learner, meter, before)
            if not recovers(error):
                raise


def _looks(job: Job) -> bool:
    """Whether each step looks for gradients that aren't finite."""
    return job.config.failure.on_nonfinite != "raise"


def _take_step(
    job: Job, micro_batches: Sequence[MicroBatch], before: list[Tensor], repeat: StepRepeat | None, shares: bool
) -> bool:
    """Do what `train_step` does once a batch is prepared.

    before: the state for `put_back`; empty if nothing may undo the step. `put_back` restores all that is changed before
    the last collective, the one that shares the sums.
    repeat: compares the step with a second computation; None: it is computed once.
    shares: whether ranks keep each other's sums of metrics.
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
    """Compute the gradient of a step; returns the losses of each micro-batch."""
    learner, losses = job.learner, []
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.sharding is not None:
        job.stopwatch.wait()  # until the buffers of rank 0 arrive, this rank waits
        learner.sharding.begin_step(learner.model)
        job.stopwatch.go_on()
    for number, micro in enumerate(micro_batches):
        with _gradient_sync(learner, is_last=number == len(micro_batches) - 1):
            losses.append(_forward_backward(job, micro))
    return losses


def _gradients_again(job: Job, micro_batches: Sequence[MicroBatch], before: list[Tensor]) -> Sequence[Tensor]:
    """As `_gradients`, from the same state."""
    put_back(job.learner, job.progress.train, before)
    _seed_step(job)
    return _gradients(job, micro_batches)


def _seed_step(job: Job) -> None:
    """Make what the coming step draws from torch, numpy or Python depend on (seed, step, rank) alone."""
    seed = derive_seed(job.config.seed, _STEP, job.progress.step, job.group.rank) % 2**63
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend, which takes longer
    if job.group.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _forward_backward(job: Job, micro: MicroBatch) -> Tensor:
    """Add the gradient of a micro-batch; returns its losses, [rows]."""
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
    """Whether the step is worth taking; the same on every rank, and collective. `norm`: None in fp16."""
    if norm is None:
        # the scaler handles an overflowing gradient; no scale makes a non-finite loss finite
        return job.group.all_agree(bool(torch.isfinite(torch.cat(list(losses))).all()))
    # gradients are summed over ranks: if they are not finite on one rank, they are not on any
    return bool(torch.isfinite(norm))


def _gradient_norm(learner: Learner) -> Tensor:
    gradients = [parameter.grad for parameter in learner.trainable.parameters() if parameter.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def _clip(learner: Learner, config: TrainConfig, norm: Tensor | None) -> None:
    """Clip gradients in the one way that the config names, if any. `norm`: of all of them, if it is known already."""
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
    """DDP, and replicas of a sharded model, average gradients in the last micro-batch of a step only."""
    if learner.sharding is not None:
        learner.sharding.sync_replicas(learner.model, is_last=is_last)
    if is_last or not isinstance(learner.wrapped, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return learner.wrapped.no_sync()


def thaw(job: Job) -> bool:
    """Freeze and unfreeze what the epoch asks for; returns whether that changed anything, and then it is collective."""
    learner, progress = job.learner, job.progress
    if not learner.thaw(progress.epoch):
        return False
    settle_gradient_order(job)
    job.utilisation.restart_count()
    if job.group.rank == 0:
        job.channel.send(Happened(events.Thawed(progress.epoch, learner.freezing.num_frozen)))
    return True


def settle_gradient_order(job: Job) -> None:
    """Have DDP arrange its buckets for good before the first step; collective.

    It does so after an attempt's first backward pass. Gradients then lie elsewhere in the buffers that are summed
    over ranks, and with three ranks or more the sums are added up in another order: an attempt that resumed would
    round its first step otherwise than the run that was never stopped. FSDP2 arranges them once, by the model alone.
    """
    if job.group.world_size < 3 or job.learner.sharding is not None:  # a + b is b + a
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
