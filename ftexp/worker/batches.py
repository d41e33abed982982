"""The batches that a worker trains on, in the order of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from ftexp.data.batches import Batch
from ftexp.data.feeds.feed import prefetched
from ftexp.job.job import Job
from ftexp.storage.directory import Storage
from ftexp.worker.profiler import profiled


def feeding(job: Job, run_dir: Storage) -> Generator[Batch]:
    """Yield `batches`, timed, and with the steps profiled that the config selects."""
    return profiled(job, run_dir, job.stopwatch.feeding(batches(job), lambda: job.progress.position))


def batches(job: Job) -> Generator[Batch]:
    """Yield this rank's share of every global batch from the run's position on, also after a rollback."""
    while not job.progress.finished:
        feed = job.data.feed.from_position(job.progress.position)
        ahead_of_loop = prefetched(feed, prefetch_depth(job), job.stopwatch.note_queue)
        with contextlib.closing(feed), contextlib.closing(ahead_of_loop) as ahead:
            for batch in ahead:
                job.data.current = batch
                yield batch
                if job.progress.position != batch.end:
                    break


def prefetch_depth(job: Job) -> int:
    """Return the number of batches that are prepared ahead of the current one."""
    configured = job.config.data.prefetch_batches
    if configured is not None:
        return configured
    return 2 if job.group.device.type == "cuda" else 0
