"""One optimiser step on a rank's share of a global batch: what the loop repeats."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

from ftexp.data.batches import Batch, MicroBatch
from ftexp.failure.nonfinite import before_step, put_back
from ftexp.job.job import Job
from ftexp.job.stopwatch import BACKWARD, FORWARD, OPTIMIZER
from ftexp.model.freezing import classifier_parameters


def train_step(job: Job, batch: Batch) -> bool:
    """One optimiser step on this rank's share of a global batch; False if its gradient was NaN or infinite.

    Then everything is as before, where failure.on_nonfinite asks to look; else the next logged point tells.
    In fp16 a gradient that is too large for the loss scale is none of that: the scaler leaves the step out, lowers the
    scale, and `job.num_overflows` counts it.
    """
    micro_batches = [prepared(job, micro, batch.start) for micro in batch.micro_batches]
    job.seed_step()
    looks = job.config.failure.on_nonfinite != "raise"
    before = before_step(job) if looks else []
    scale = job.scaler.get_scale()
    job.optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, micro in enumerate(micro_batches):
        with _gradient_sync(job, is_last=number == len(micro_batches) - 1):
            losses.append(_forward_backward(job, micro))
    norm = _gradient_norm(job) if looks and not job.scaler.is_enabled() else None
    if looks and not _is_finite(job, losses, norm):
        put_back(job, before)
        return False
    _clip(job, norm)
    job.num_skipped = 0
    job.scaler.step(job.optimizer)
    job.scaler.update()
    if job.scaler.get_scale() < scale:
        job.num_overflows += 1
    elif job.average is not None:
        job.average.update(job.model, job.progress.step + 1)
    job.stopwatch.lap(OPTIMIZER)
    return True


def prepared(job: Job, micro: MicroBatch, start: int) -> MicroBatch:
    """Erased and mixed, as far as the config asks for it, for the global batch that begins at position `start`.

    Both draw from global generators, which the step seeds afterwards; so this is done on the thread that trains.
    """
    if job.erasing is not None:
        micro = dataclasses.replace(micro, images=job.erasing(micro.images, micro.positions))
    return micro if job.mixing is None else job.mixing(micro, start)


def _forward_backward(job: Job, micro: MicroBatch) -> Tensor:
    """Add the gradient of a micro-batch; returns its losses, [rows]."""
    with job.autocast():
        logits = job.as_logits(job.wrapped(micro.images))
    if micro.targets is None:
        smoothing, best = job.config.train.label_smoothing, micro.labels
        losses = F.cross_entropy(logits.float(), micro.labels, reduction="none", label_smoothing=smoothing)
    else:  # mixed: right is the class with the larger part
        best = micro.targets.argmax(1)
        losses = F.cross_entropy(logits.float(), micro.targets, reduction="none")
    job.stopwatch.lap(FORWARD)
    if job.poisoned:
        losses, job.poisoned = losses * math.nan, False
    job.scaler.scale((losses * micro.weights).sum()).backward()  # type: ignore[no-untyped-call]
    job.progress.train.add(losses, logits.argmax(1) == best, micro.weights > 0)
    job.stopwatch.lap(BACKWARD)
    return losses.detach()


def _is_finite(job: Job, losses: list[Tensor], norm: Tensor | None) -> bool:
    """Whether the step is worth taking; the same on every rank, and collective. `norm`: None in fp16."""
    if norm is None:
        # a gradient that overflows is the scaler's affair; a loss that isn't finite no scale would mend
        return job.all_agree(bool(torch.isfinite(torch.cat(losses)).all()))
    # gradients are summed over ranks: where one rank's are not finite, all ranks' are
    return bool(torch.isfinite(norm))


def _gradient_norm(job: Job) -> Tensor:
    gradients = [parameter.grad for parameter in job.model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _clip(job: Job, norm: Tensor | None) -> None:
    """Clip gradients in the one way that the config names, if any. `norm`: of all of them, if it is known already."""
    config = job.config.train
    if config.clip_grad_norm is None and config.clip_grad_value is None and config.clip_grad_agc is None:
        return
    job.scaler.unscale_(job.optimizer)
    if config.clip_grad_norm is not None:
        norm = _gradient_norm(job) if norm is None else norm
        torch.nn.utils.clip_grads_with_norm_(job.model.parameters(), config.clip_grad_norm, norm)
    elif config.clip_grad_value is not None:
        torch.nn.utils.clip_grad_value_(job.model.parameters(), config.clip_grad_value)
    else:
        head = classifier_parameters(job.model)
        body = [parameter for name, parameter in job.model.named_parameters() if name not in head]
        adaptive_clip_grad(body, config.clip_grad_agc)


def _gradient_sync(job: Job, is_last: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP averages gradients in the last micro-batch of a step only."""
    if is_last or not isinstance(job.wrapped, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return job.wrapped.no_sync()


def thaw(job: Job) -> None:
    """Freeze and unfreeze what the epoch asks for; collective where that changes anything.

    DDP is made anew then: it averages the gradients of those parameters that needed one when it was made.
    """
    if job.freezing is None or not job.freezing.settle(job.progress.epoch):
        return
    job.wrapped = job.model  # the old one's hooks go with it, before the new one's come
    job.wrapped = job.wrap(job.model)
    settle_gradient_order(job)
    if job.utilisation is not None:
        job.utilisation.count_anew()
    if job.rank == 0:
        job.line.send("event", name="thawed", epoch=job.progress.epoch, num_frozen=job.freezing.num_frozen)


def settle_gradient_order(job: Job) -> None:
    """Have DDP arrange its buckets for good before the first step; collective.

    It does so after an attempt's first backward pass. Gradients then lie elsewhere in the buffers that are summed
    over ranks, and with three ranks or more the sums are added up in another order: an attempt that resumed would
    round its first step otherwise than the run that was never stopped.
    """
    if job.world_size < 3:  # a + b is b + a
        return
    before = before_step(job)
    shape = (2, job.info.channels, job.info.image_size, job.info.image_size)
    with job.autocast():
        logits = job.as_logits(job.wrapped(torch.zeros(shape, device=job.device)))
    logits.float().sum().backward()  # type: ignore[no-untyped-call]
    put_back(job, before)
