"""The training loop that every worker runs."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import ftexp.checkpoint.states  # noqa: F401 - registers the built-in states
from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.registry import ExtraState
from ftexp.checkpoint.store import CheckpointStore
from ftexp.data.feeds import Batch, evaluation_batches, prefetched
from ftexp.evaluation import count_into
from ftexp.job import Job, JobSpec, build_job
from ftexp.progress import Meter, means
from ftexp.registry import load_plugins
from ftexp.storage import Storage

_TICK_INTERVAL_S = 0.1  # between messages that only move the progress bar


def train_loop(spec: JobSpec) -> dict[str, float]:
    """Train from the latest verified checkpoint, or from the start, to the end; returns the last metrics.

    Runs on every worker of a Ray Train group, with the datasets train, val and test.
    """
    load_plugins(spec.config.plugins)
    job = build_job(spec)
    try:
        return _train(job, CheckpointStore(Storage(spec.checkpoints_uri)))
    except Exception:
        job.line.send(
            "raised",
            rank=job.rank,
            step=job.progress.step,
            traceback=traceback.format_exc(),
        )
        raise
    finally:
        job.line.close()


def _train(job: Job, store: CheckpointStore) -> dict[str, float]:
    checkpoints = CheckpointManager(job, store, ExtraState(job.config.checkpoint.extra_state, job))
    restore(job, store, checkpoints)
    announce(job)
    progress, ticker = job.progress, Ticker(job)
    batches = prefetched(job.feed.from_position(progress.position), prefetch_depth(job))
    for batch in batches:
        train_step(job, batch)
        epoch_ended = advance(job, batch)
        ticker.tick()
        if progress.step % job.config.train.log_every_steps == 0:
            log_train(job)
        if epoch_ended and evaluation_due(job):
            evaluate(job, "val")
            update_best(job)
        if checkpoints.due(epoch_ended):
            checkpoints.save()
    checkpoints.finish()
    evaluate(job, "test")
    return dict(progress.metrics)


def train_step(job: Job, batch: Batch) -> None:
    """One optimiser step on this rank's share of a global batch."""
    config = job.config.train
    job.seed_step()
    job.optimizer.zero_grad(set_to_none=True)
    for number, micro in enumerate(batch.micro_batches):
        is_last = number == len(batch.micro_batches) - 1
        with _gradient_sync(job, is_last):
            with job.autocast():
                logits = job.wrapped(micro.images)
            losses = F.cross_entropy(
                logits.float(), micro.labels, reduction="none", label_smoothing=config.label_smoothing
            )
            job.scaler.scale((losses * micro.weights).sum()).backward()  # type: ignore[no-untyped-call]
        job.progress.train.add(losses, logits.argmax(1) == micro.labels, micro.weights > 0)
    if config.clip_grad_norm is not None:
        job.scaler.unscale_(job.optimizer)
        torch.nn.utils.clip_grad_norm_(job.model.parameters(), config.clip_grad_norm)
    job.scaler.step(job.optimizer)
    job.scaler.update()


def _gradient_sync(job: Job, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP averages gradients in the last micro-batch of a step only."""
    if enabled or not isinstance(job.wrapped, torch.nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return job.wrapped.no_sync()


def advance(job: Job, batch: Batch) -> bool:
    """Count the step just done; returns whether an epoch ended in it."""
    progress, samples = job.progress, len(job.rows["train"])
    progress.step += 1
    progress.position = batch.end
    job.scheduler.step_update(progress.step)
    before, progress.epoch = progress.epoch, batch.end // samples
    return progress.epoch > before


def restore(job: Job, store: CheckpointStore, checkpoints: CheckpointManager) -> None:
    """Go to the latest checkpoint that verifies. Rank 0 decides, and every rank loads what it decided."""
    started = time.perf_counter()
    rejected: dict[str, str] = {}
    chosen = store.latest(rejected.__setitem__) if job.rank == 0 else None
    for name, reason in rejected.items():
        job.line.send("event", name="checkpoint_rejected", checkpoint=name, reason=reason)
    box = [chosen[0].name if chosen else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return
    if chosen is None:
        manifest = store.by_name(box[0])
        chosen = manifest, store.read(manifest)
    checkpoints.restore(*chosen)
    if job.rank == 0:
        seconds = round(time.perf_counter() - started, 3)
        fields = {"checkpoint": box[0], "step": job.progress.step, "position": job.progress.position}
        job.line.send("event", name="restored", rejected=len(rejected), restore_s=seconds, **fields)


def announce(job: Job) -> None:
    """Tell the driver what was built, once everything is ready to train."""
    if job.rank == 0:
        job.line.send(
            "ready",
            num_parameters=sum(parameter.numel() for parameter in job.model.parameters()),
            device=str(job.device),
            total_steps=math.ceil(job.total_positions / job.config.train.global_batch_size),
            step=job.progress.step,
            weights=str(job.weights_report) if job.weights_report else None,
        )


def evaluation_due(job: Job) -> bool:
    """Whether the epoch just ended is one that is evaluated; the last always is."""
    finished = job.progress.position >= job.total_positions
    return finished or job.progress.epoch % job.config.train.eval_every_epochs == 0


def evaluate(job: Job, split: str) -> None:
    """Measure `<split>_loss` and `<split>_accuracy` over all ranks; collective. An empty split has none."""
    if not len(job.rows[split]):
        return
    if dist.is_initialized():
        for buffer in job.model.buffers():  # batch norm's statistics are each rank's own between steps
            dist.broadcast(buffer, src=0)
    config, meter = job.config.train, Meter(job.device)
    size = config.eval_batch_size or max(1, 4 * config.global_batch_size // job.world_size)
    batches = evaluation_batches(job.rows[split], job.to_tensors, size, job.rank, job.world_size)
    count_into(meter, job.model, batches, job.autocast())
    loss, accuracy = means(meter.totals())
    _log(job, split, {f"{split}_loss": loss, f"{split}_accuracy": accuracy})


def log_train(job: Job) -> None:
    """Log the mean training loss and accuracy since the last point; collective."""
    loss, accuracy = means(job.progress.train.totals())
    job.progress.train.reset()
    rate = job.optimizer.param_groups[0]["lr"]
    _log(job, "train", {"train_loss": loss, "train_accuracy": accuracy, "lr": rate})


def _log(job: Job, split: str, values: dict[str, float]) -> None:
    progress = job.progress
    progress.metrics.update(values)
    if job.rank == 0:
        job.line.send("metrics", split=split, step=progress.step, epoch=progress.epoch, values=values)


def update_best(job: Job) -> None:
    """Remember the step if `checkpoint.checkpoint_score_attribute` was never better."""
    config = job.config.checkpoint
    name, value = config.checkpoint_score_attribute, job.progress.metrics.get(config.checkpoint_score_attribute)
    if value is None or math.isnan(value):
        return
    sign = 1 if config.checkpoint_score_order == "max" else -1
    if not job.best or sign * value > sign * job.best["value"]:
        job.best = {"metric": name, "value": value, "step": job.progress.step}


def prefetch_depth(job: Job) -> int:
    """How many batches are made ahead of the one that trains."""
    configured = job.config.data.prefetch_batches
    if configured is not None:
        return configured
    return 2 if job.device.type == "cuda" else 0


class Ticker:
    """Keeps the driver's progress bar moving, at a bounded rate."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last = 0.0

    def tick(self) -> None:
        """Tell the driver the step, unless it was told a moment ago."""
        now = time.monotonic()
        if self._job.rank == 0 and now - self._last >= _TICK_INTERVAL_S:
            self._last = now
            progress = self._job.progress
            self._job.line.send("tick", step=progress.step, position=progress.position, epoch=progress.epoch)
