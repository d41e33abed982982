"""Traces of chosen steps of one rank by torch's profiler, for chrome://tracing and Perfetto (profile=true)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch

from ftexp.data.batches import Batch
from ftexp.job.job import Job
from ftexp.rundir.names import PROFILE
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened


def profiled(job: Job, run_dir: Storage, batches: Generator[Batch]) -> Generator[Batch]:
    """Yield `batches`; if `profile.enabled`, trace `profile.num_steps` steps from `profile.start_step` on.

    The trace is written to the run directory after the last of these steps, or when the run ends before it.
    """
    config, progress = job.config.profile, job.progress
    with contextlib.closing(batches):
        if config.enabled and job.group.rank == config.rank % job.group.world_size:
            first, end = config.start_step, config.start_step + config.num_steps
            if first > job.total_steps:
                error = f"profile.start_step={first} never comes: the run has {job.total_steps} steps"
                job.channel.send(Happened(events.ProfileFailed(error)))
                end = first
            yield from _while(batches, lambda: progress.step + 1 < first)
            if first <= progress.step + 1 < end:
                with _trace(job, run_dir):
                    yield from _while(batches, lambda: progress.step + 1 < end)
        yield from batches


def _while(batches: Generator[Batch], goes_on: Callable[[], bool]) -> Iterator[Batch]:
    while goes_on() and (batch := next(batches, None)) is not None:
        yield batch


@contextlib.contextmanager
def _trace(job: Job, run_dir: Storage) -> Iterator[None]:
    """Trace the block. Errors are logged and never fail the run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.group.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    profiler.start()
    try:
        yield
    finally:
        profiler.stop()
        directory, name = run_dir.child(PROFILE), f"rank{job.group.rank}.json.gz"
        try:
            with tempfile.TemporaryDirectory() as scratch:
                profiler.export_chrome_trace(f"{scratch}/{name}")
                directory.write_bytes(name, (Path(scratch) / name).read_bytes())
        except OSError as error:
            job.channel.send(Happened(events.ProfileFailed(f"{name}: {error}")))
        else:
            job.channel.send(Happened(events.ProfileWritten(directory.child(name).uri)))
