"""The training loop that every worker runs."""

from __future__ import annotations

import contextlib
import json
import math
import time
import traceback
from collections.abc import Generator, Iterator

import torch.distributed as dist

import ftexp.checkpoint.states  # noqa: F401 - registers the built-in states
from ftexp.chaos.strike import Chaos, FaultyStore
from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.registry import ExtraState
from ftexp.checkpoint.restore import restore
from ftexp.checkpoint.store import CHECKPOINTS, CheckpointStore
from ftexp.data.batches import Batch
from ftexp.data.feeds.feed import evaluation_batches, prefetched
from ftexp.data.info import IndexedSplit
from ftexp.errors import NonFiniteError
from ftexp.evaluation.counting import count_into
from ftexp.evaluation.meter import Meter, means
from ftexp.evaluation.mistakes import Findings, described, evaluation_file
from ftexp.failure.nonfinite import roll_back, skip_step
from ftexp.failure.phases import AGREEMENT, BETWEEN, EVALUATION, SAVE, START, STEP
from ftexp.failure.watchdog import Watchdog, hang_limits, report_hang
from ftexp.job.job import Job, build_job
from ftexp.job.spec import JobSpec
from ftexp.job.stopwatch import SAVE as SAVING
from ftexp.model.build import timm_arguments
from ftexp.registry import load_plugins
from ftexp.storage.directory import Storage
from ftexp.worker.hardware import describe
from ftexp.worker.profiler import profiled
from ftexp.worker.speed import speeds
from ftexp.worker.step import settle_gradient_order, thaw, train_step

_TICK_INTERVAL_S = 0.1  # between messages that only move the progress bar


def train_loop(spec: JobSpec, streams: dict[str, IndexedSplit]) -> dict[str, float] | None:
    """Train from the latest verified checkpoint, or from the start, to the end; returns the last metrics.

    None if it was stopped before the end, after a last save.
    Runs on every worker of a Ray Train group, with the datasets train, val and test, or else with `streams` of them.
    """
    load_plugins(spec.config.plugins)
    job = build_job(spec, streams)
    try:
        return _train(job, Storage(spec.run_uri))
    except Exception:
        job.line.send(
            "raised",
            rank=job.rank,
            step=job.progress.step,
            position=job.progress.position,
            samples=job.batch.samples.tolist() if job.batch is not None else [],
            traceback=traceback.format_exc(),
        )
        raise
    finally:
        job.line.close()


def _train(job: Job, run_dir: Storage) -> dict[str, float] | None:
    store = FaultyStore(run_dir.child(CHECKPOINTS))
    checkpoints = CheckpointManager(job, store, ExtraState(job.config.checkpoint.extra_state, job))
    chaos = Chaos(job, store, checkpoints, run_dir)
    watchdog = Watchdog(hang_limits(job.config.failure), lambda *found: report_hang(job, run_dir, *found))
    fed = profiled(job, run_dir, job.stopwatch.feeding(batches(job), lambda: job.progress.position))
    watchdog.start()
    try:
        _run(job, fed, store, checkpoints, chaos, watchdog)
        if job.finished:
            with watchdog.during(EVALUATION):
                test(job, run_dir)
    finally:
        watchdog.stop()
        fed.close()  # ends what decodes for it
    return dict(job.progress.metrics) if job.finished else None


def _run(
    job: Job,
    fed: Iterator[Batch],
    store: CheckpointStore,
    checkpoints: CheckpointManager,
    chaos: Chaos,
    watchdog: Watchdog,
) -> None:
    settle_gradient_order(job)
    restore(job, store, checkpoints)
    announce(job)
    checkpoints.keep_in_memory()
    progress, ticker = job.progress, Ticker(job)
    in_step = START  # until one step is done: the first compiles, and fills what is prefetched
    for batch in fed:
        job.batch = batch
        watchdog.beat(in_step)
        thaw(job)
        if job.skips.cover(batch.start):
            job.num_skipped += 1
        elif not train_step(job, batch):
            if job.config.failure.on_nonfinite == "rollback":
                roll_back(job, batch, checkpoints)
                continue
            skip_step(job, batch)
        in_step = STEP
        watchdog.beat(BETWEEN)
        epoch_ended = advance(job, batch)
        ticker.tick()
        if progress.step % job.config.train.log_every_steps == 0 or job.finished:
            with watchdog.during(AGREEMENT):
                log_train(job)
        if evaluation_due(job, epoch_ended):
            with watchdog.during(EVALUATION), job.stopwatch.apart():
                evaluate(job, "val")
            update_best(job)
        chaos.strike()
        with watchdog.during(AGREEMENT):
            due = checkpoints.due(epoch_ended)
        if due:
            with watchdog.during(SAVE), job.stopwatch.section(SAVING):
                checkpoints.save()
        if checkpoints.stopping:
            break
    ticker.tick(at_once=True)
    with watchdog.during(SAVE):
        checkpoints.finish()


def batches(job: Job) -> Generator[Batch]:
    """Yield this rank's share of every global batch from where the run stands, also where it was put back meanwhile."""
    while not job.finished:
        feed = job.feed.from_position(job.progress.position)
        with contextlib.closing(feed), contextlib.closing(prefetched(feed, prefetch_depth(job))) as ahead:
            for batch in ahead:
                yield batch
                if job.progress.position != batch.end:
                    break


def advance(job: Job, batch: Batch) -> bool:
    """Count the step just done; returns whether an epoch ended in it."""
    progress, samples = job.progress, len(job.rows["train"])
    progress.step += 1
    progress.position = batch.end
    job.ledger.note(progress.step, batch, skipped=job.skips.cover(batch.start))
    job.scheduler.step_update(progress.step)
    before, progress.epoch = progress.epoch, batch.end // samples
    return progress.epoch > before


def announce(job: Job) -> None:
    """Tell the driver what was built, once everything is ready to train."""
    if job.rank == 0:
        job.line.send(
            "ready",
            arguments=timm_arguments(job.config.model, job.info),
            num_parameters=sum(parameter.numel() for parameter in job.model.parameters()),
            device=str(job.device),
            hardware=describe(job.device),
            total_steps=job.total_steps,
            step=job.progress.step,
            weights=str(job.weights_report) if job.weights_report else None,
        )


def evaluation_due(job: Job, epoch_ended: bool) -> bool:
    """Whether to evaluate after the step just done: at the end, and after every so many epochs."""
    return job.finished or (epoch_ended and job.progress.epoch % job.config.train.eval_every_epochs == 0)


def evaluate(job: Job, split: str, findings: Findings | None = None) -> None:
    """Measure `<split>_loss` and `<split>_accuracy` over all ranks, the average's with `_ema` at the end; collective.

    An empty split has none. `findings` are the weights' own, not the average's.
    """
    if not len(job.rows[split]):
        return
    models = {"": job.model} if job.average is None else {"": job.model, "_ema": job.average.model}
    if dist.is_initialized():
        for model in models.values():
            for buffer in model.buffers():  # batch norm's statistics are each rank's own between steps
                dist.broadcast(buffer, src=0)
    config, meters = job.config.train, {suffix: Meter(job.device) for suffix in models}
    most = max(1, 4 * config.global_batch_size // (job.world_size * job.accumulate_steps))  # what surely has room
    size = config.eval_batch_size or most
    if job.accumulate_steps > config.accumulate_steps:  # memory has run out before
        size = min(size, most)
    batches = evaluation_batches(job.rows[split], job.to_tensors, size, job.rank, job.world_size)
    measured = list(zip(models.values(), meters.values(), strict=True))
    count_into(measured, job.as_logits, batches, job.autocast(), findings)
    values: dict[str, float] = {}
    for suffix, meter in meters.items():
        loss, accuracy = means(meter.totals())
        values |= {f"{split}_loss{suffix}": loss, f"{split}_accuracy{suffix}": accuracy}
    _log(job, split, values)


def test(job: Job, run_dir: Storage) -> None:
    """Evaluate the test split, and leave what a report shows of it in the run directory; collective."""
    if not job.config.report.enabled or not len(job.rows["test"]):
        evaluate(job, "test")
        return
    findings = Findings(job.info.num_classes, job.to_tensors.pixels)
    evaluate(job, "test", findings)
    found, progress = findings.gathered(), job.progress
    if job.rank == 0:
        values = {name: progress.metrics[f"test_{name}"] for name in ("accuracy", "loss")}
        head = {"run": run_dir.uri, "checkpoint": None, "step": progress.step, "epoch": progress.epoch, "split": "test"}
        content = {**head, **values, **described(found, job.info.class_names)}
        try:
            run_dir.write_bytes(evaluation_file("test"), json.dumps(content).encode())
        except OSError as error:  # the run is as good without
            job.line.send("event", name="report_failed", error=f"{evaluation_file('test')}: {error}")


def log_train(job: Job) -> None:
    """Log the mean training loss and accuracy since the last point; collective."""
    totals = job.progress.train.totals()
    if totals[3]:
        raise NonFiniteError(f"{totals[3]} losses were NaN or infinite by step {job.progress.step}")
    loss, accuracy = means(totals)
    job.progress.train.reset()
    rate = max(group["lr"] for group in job.optimizer.param_groups)  # layer-wise decay has the head's the largest
    values = {"train_loss": loss, "train_accuracy": accuracy, "lr": rate}
    if job.scaler.is_enabled():
        values |= {"loss_scale": job.scaler.get_scale(), "num_overflows": job.num_overflows}
    _log(job, "train", values, speeds(job))
    if values.get("loss_scale", 1) < 1:
        raise NonFiniteError(
            f"gradients overflow in fp16 whatever the loss scale, which has come down to {values['loss_scale']} by "
            f"step {job.progress.step}: lower optim.lr, clip gradients, or take train.precision=bf16"
        )


def _log(job: Job, split: str, values: dict[str, float], beside: dict[str, float] | None = None) -> None:
    """Log a point. What is `beside` is no part of what the run computes: checkpoints don't hold it."""
    progress = job.progress
    progress.metrics.update(values)
    if job.rank == 0:
        values = {**values, **(beside or {})}
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

    def tick(self, at_once: bool = False) -> None:
        """Tell the driver the step, unless it was told a moment ago and this isn't to be `at_once`."""
        now = time.monotonic()
        if self._job.rank == 0 and (at_once or now - self._last >= _TICK_INTERVAL_S):
            self._last = now
            progress = self._job.progress
            self._job.line.send("tick", step=progress.step, position=progress.position, epoch=progress.epoch)
