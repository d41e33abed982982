"""Evaluation of the validation and test splits."""

from __future__ import annotations

import json
import math

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn

from ftexp.data.feeds.feed import evaluation_batches
from ftexp.data.plan import even_part
from ftexp.evaluation.counting import measured, metric_set_of
from ftexp.evaluation.findings import Findings, findings_of
from ftexp.job.job import Job
from ftexp.rundir.names import evaluation_file
from ftexp.storage.append_log import finite
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened
from ftexp.worker.log import log_point


def evaluation_due(job: Job, epoch_ended: bool) -> bool:
    """Return whether to evaluate after the step just done: at the end, and every `train.eval_every_epochs` epochs."""
    return job.progress.finished or (epoch_ended and job.progress.epoch % job.config.train.eval_every_epochs == 0)


def evaluate(job: Job, split: str, findings: Findings | None = None) -> None:
    """Log `<split>_loss`, `<split>_accuracy` and train.metrics over all ranks; collective.

    The EMA's have the suffix `_ema`. A regression has no accuracy. An empty split is not evaluated.

    findings: gets the batches and outputs of the weights, not of the EMA.
    """
    if not len(job.data.rows[split]):
        return
    group, learner, data = job.group, job.learner, job.data
    models = {"": learner.model} if learner.ema is None else {"": learner.model, "_ema": learner.ema.model}
    if dist.is_initialized():
        _share_statistics(job, split)
    size = _batch_size(job)
    batches = evaluation_batches(data.rows[split], data.to_tensors, size, group.rank, group.world_size)
    idle = _idle_batches(job, split, size) if learner.sharding is not None else []
    metric_set = metric_set_of(job.config.train.metrics, job.info, group.device)
    autocast, task = learner.autocast, job.info.task
    values = measured(split, models, learner.as_logits, batches, autocast, findings, metric_set, task, idle=idle)
    log_point(job, split, values)


def _share_statistics(job: Job, split: str) -> None:
    """Share batch norm's statistics, so that an evaluation uses the same ones after resuming from the checkpoint."""
    learner, world_size = job.learner, job.group.world_size
    # the test follows the last checkpoint, so it uses the checkpoint's statistics, which are rank 0's
    share_statistics(learner.model, "broadcast" if split == "test" else job.config.train.dist_bn, world_size)
    if learner.ema is not None:  # each rank averages its own statistics; rank 0 saves the EMA
        share_statistics(learner.ema.model, "broadcast", world_size)


def share_statistics(model: nn.Module, dist_bn: str, world_size: int) -> None:
    """Share batch norm's statistics, which differ between ranks during training; collective."""
    if dist_bn == "broadcast":
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    elif dist_bn == "reduce":
        distribute_bn(model, world_size, reduce=True)


def _batch_size(job: Job) -> int:
    """Return the rows of a rank's evaluation batch: as configured, or four times a micro-batch, which surely fits."""
    config, accumulate_steps = job.config.train, job.data.accumulate_steps
    has_room = max(1, 4 * config.global_batch_size // (job.group.world_size * accumulate_steps))
    size = config.eval_batch_size or has_room
    # more micro-batches than configured: memory ran out before
    return min(size, has_room) if accumulate_steps > config.accumulate_steps else size


def _idle_batches(job: Job, split: str, size: int) -> list[Tensor]:
    """Return extra images for a rank with fewer batches than rank 0: all must gather a sharded model equally often.

    size: rows of a batch.
    """
    group, info, num_rows = job.group, job.info, len(job.data.rows[split])
    max_batches, own = (
        math.ceil((last - first) / size)
        for first, last in (even_part(0, num_rows, rank, group.world_size) for rank in (0, group.rank))
    )
    image = torch.zeros((1, info.channels, info.image_size, info.image_size), device=group.device)
    return [image] * (max_batches - own)


def test(job: Job, run_dir: Storage) -> None:
    """Evaluate the test split, and write the results for the report to the run directory; collective."""
    if not job.config.report.enabled or not len(job.data.rows["test"]):
        evaluate(job, "test")
        return
    findings = findings_of(job.info, job.data.to_tensors.pixels)
    evaluate(job, "test", findings)
    found, progress = findings.report(job.info), job.progress
    if job.group.rank == 0:
        values = {name: progress.metrics.get(f"test_{name}") for name in ("accuracy", "loss")}
        head = {"run": run_dir.uri, "checkpoint": None, "step": progress.step, "epoch": progress.epoch}
        head |= {"split": "test", "task": job.info.task}
        metrics = finite({name: progress.metrics[f"test_{name}"] for name in job.config.train.metrics})
        content = {**head, **values, "metrics": metrics, **found}
        try:
            run_dir.write_bytes(evaluation_file("test"), json.dumps(content).encode())
        except OSError as error:  # only the report needs the file
            job.channel.send(Happened(events.ReportFailed(f"{evaluation_file('test')}: {error}")))
