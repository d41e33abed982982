"""The training loop that every worker runs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ftexp.chaos.plan import planned_faults
from ftexp.checkpoint.build import build_manager
from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.memory.links import RayLinks
from ftexp.checkpoint.restore import restore
from ftexp.checkpoint.store import CheckpointStore
from ftexp.data.batches import Batch
from ftexp.data.info import IndexedSplit
from ftexp.failure.meeting import MEETING
from ftexp.failure.nonfinite import NonFiniteRecovery
from ftexp.failure.phases import AGREEMENT, BETWEEN, EVALUATION, SAVE, START, STEP
from ftexp.failure.watchdog import Watchdog, hang_limits, hang_reporter
from ftexp.job.build import build_job
from ftexp.job.job import Job
from ftexp.job.spec import JobSpec
from ftexp.job.stopwatch import SAVE as SAVING
from ftexp.registry import load_plugins
from ftexp.rundir.names import CHECKPOINTS
from ftexp.storage.directory import Storage
from ftexp.wire.messages import Raised
from ftexp.worker.batches import feeding
from ftexp.worker.corruption import ReplicaCheck, StepRepeat
from ftexp.worker.evaluation import evaluation_due, test
from ftexp.worker.log import Ticker, announce, log_train
from ftexp.worker.ranks import RankTimes
from ftexp.worker.replacing import Facts, Replacing, come
from ftexp.worker.step import settle_gradient_order, thaw, train_step
from ftexp.worker.validation import ask_again, settle, validate

if TYPE_CHECKING:
    from ftexp.chaos.strike import Chaos


def train_loop(spec: JobSpec, streams: dict[str, IndexedSplit]) -> dict[str, float] | None:
    """Train from the latest verified checkpoint, or from the start, to the end; return the last metrics.

    None if the run was stopped before its end, after a final checkpoint.
    Runs on every worker of a Ray Train group.

    streams: those of the splits train, val and test that are streamed; the others are Ray Train's datasets.
    """
    load_plugins(spec.config.plugins)
    job = build_job(spec, streams)
    try:
        return _train(job, Storage(spec.run_uri))
    except Exception:
        batch, progress = job.data.current, job.progress
        samples = batch.samples.tolist() if batch is not None else []
        job.channel.send(Raised(job.group.rank, progress.step, progress.position, samples, traceback.format_exc()))
        raise
    finally:
        job.channel.close()


def _train(job: Job, run_dir: Storage) -> dict[str, float] | None:
    progress, batches = job.progress, feeding(job, run_dir)
    chaos = planned_chaos(job, run_dir)
    if chaos is None:
        store = CheckpointStore(run_dir.child(CHECKPOINTS))
    else:
        store, batches = chaos.store, chaos.feeding(batches)
    checkpoints = build_manager(job, store, RayLinks())
    report_hang = hang_reporter(job.run, job.group, job.channel, run_dir)
    watchdog = Watchdog(hang_limits(job.config.failure), report_hang)
    watchdog.start()
    try:
        replacing = begin(job, store, checkpoints)
        with watchdog.during(EVALUATION):
            settle(job, max_pending=1)  # two are pending if the run was stopped while it waited
        run_steps(job, batches, checkpoints, watchdog, chaos, replacing)
        has_ended = progress.finished and not progress.pending
        if has_ended:
            with watchdog.during(EVALUATION):
                test(job, run_dir)
            job.hooks.at_end()
    finally:
        MEETING.expect(False)  # first, since the rest takes a while
        watchdog.stop()
        checkpoints.close()
        batches.close()  # also stops the decoding
    return dict(progress.metrics) if has_ended else None


def planned_chaos(job: Job, run_dir: Storage) -> Chaos | None:
    """Build the injector of the faults that the config plans; None if it plans none."""
    faults = planned_faults(job.config.chaos, job.total_steps)
    if not faults:
        return None
    from ftexp.chaos.strike import Chaos  # imported only if there are faults

    return Chaos(faults, job.group, job.progress, job.data.skipped, job.channel, run_dir)


def begin(job: Job, store: CheckpointStore, checkpoints: CheckpointManager) -> Replacing:
    """Restore the attempt's initial state, or receive it from the living ranks as a replacement; collective."""
    if job.group.is_awaited:
        return come(job, checkpoints)
    settle_gradient_order(job)
    announce(job, restore(job, store, checkpoints))
    ask_again(job, store)
    checkpoints.keep_in_memory()
    checkpoints.begin_snapshots()
    return Replacing(job, checkpoints, Facts(began=job.progress.step))


def run_steps(
    job: Job,
    batches: Iterator[Batch],
    checkpoints: CheckpointManager,
    watchdog: Watchdog,
    chaos: Chaos | None = None,
    replacing: Replacing | None = None,
) -> None:
    """Train on `batches`, evaluate and save, until they end, a stop is requested or a hook ends the run; collective."""
    progress, config, ticker = job.progress, job.config, Ticker(job)
    replicas, repeat, ranks = ReplicaCheck(job), StepRepeat(job), RankTimes(job)
    recovery = NonFiniteRecovery(config.failure, job.group, progress, job.data.skipped, job.channel, checkpoints)
    recovers = replacing.prepared(ranks, recovery, watchdog) if replacing is not None else None
    in_step = START  # the first step compiles, and fills the prefetch queue: it has the start's time limit
    for batch in batches:
        watchdog.beat(in_step)
        if thaw(job):
            ranks.watch()
        if not recovery.skips(batch):
            if train_step(job, batch, repeat, recovers):
                recovery.recovered()
            elif recovery.recover(batch):
                continue  # the batches continue from the restored position
        in_step = STEP
        watchdog.beat(BETWEEN)
        epoch_ended = advance(job, batch)
        ticker.tick()
        job.hooks.after_step()
        if is_logged := progress.step % config.train.log_every_steps == 0 or progress.finished:
            with watchdog.during(AGREEMENT):
                log_train(job, ranks)
        if evaluation_due(job, epoch_ended):
            with watchdog.during(EVALUATION), job.stopwatch.apart():
                if not validate(job):
                    checkpoints.stop()
        if progress.finished and not is_logged:  # a hook ended the run at this step
            with watchdog.during(AGREEMENT):
                log_train(job, ranks)
        if chaos is not None:
            chaos.strike(checkpoints, job.learner.model)
        with watchdog.during(AGREEMENT):
            due = checkpoints.due(epoch_ended)
            snapshot_due, began = checkpoints.snapshot_due(), time.perf_counter()
            replicas.check(saves=due or snapshot_due)
        if due:
            job.hooks.before_save()
            with watchdog.during(SAVE), job.stopwatch.section(SAVING):
                checkpoints.save()
        if snapshot_due:
            with watchdog.during(SAVE), job.stopwatch.section(SAVING):
                checkpoints.take_snapshot(began)
        if checkpoints.stopping or progress.stopped is not None:
            break
    ticker.tick(at_once=True)
    with watchdog.during(SAVE):
        checkpoints.finish()
    if progress.finished:
        with watchdog.during(EVALUATION):
            settle(job)


def advance(job: Job, batch: Batch) -> bool:
    """Count the step just done; return whether an epoch ended in it."""
    job.learner.before_change()  # a skipped step didn't call it, and hooks may change the state
    epoch_ended = job.progress.advance(batch.end, len(job.data.rows["train"]))
    job.ledger.note(job.progress.step, batch, skipped=job.data.skipped.cover(batch.start))
    job.learner.scheduler.step_update(job.progress.step)
    return epoch_ended
