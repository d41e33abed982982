"""The streaming feed never runs far ahead of its reader, survives killed tasks, and starts at any position."""

import os
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from ftexp.config.schema import AugmentConfig, Config
from ftexp.data.augment.pixels import Augment
from ftexp.data.feeds import streamed as stream
from ftexp.data.feeds.feed import IndexedFeed, ToTensors, request
from ftexp.data.feeds.streamed import _UNIT_ROWS, StreamedRows
from ftexp.data.info import SPLITS, DataInfo, IndexedSplit
from ftexp.data.order import SampleOrder
from ftexp.data.plan import ShardPlan
from ftexp.data.shared import Shared
from ftexp.job.build import _rows
from tests.support.processes import wait_until, wait_until_none

SIZE = 24  # so that an image is larger than its metadata
INFO = DataInfo(["a", "b"], SIZE, 1, [0.0], [1.0], {})


pytestmark = pytest.mark.usefixtures("data_ray")


@dataclass(frozen=True)
class Numbered:
    """Returns images of their item's number, and records every read with the pid of its process."""

    directory: Path

    def __call__(self, items):
        for item in items.tolist():
            yield f"item {item}", lambda item=item: self.read(item)

    def read(self, item):
        with (self.directory / f"reads.{os.getpid()}").open("a") as file:
            file.write(f"{item}\n")
        if (self.directory / f"kills.{item}").exists():
            (self.directory / f"kills.{item}").unlink()
            os.kill(os.getpid(), 9)
        return np.full((SIZE, SIZE, 1), item % 251, np.uint8)

    def num_reads(self):
        return sum(len(path.read_text().splitlines()) for path in self.directory.glob("reads.*"))


def nothing_is_bad(samples):
    raise AssertionError(samples)


def split_of(directory, num_samples):
    items = np.arange(num_samples)
    return IndexedSplit(num_samples, Numbered(directory), Shared((items, items % 2)), None)


def feed(directory, num_samples, batch, total, num_tasks=1):
    rows = StreamedRows(split_of(directory, num_samples), INFO, num_tasks, nothing_is_bad, lambda _: None)
    to_tensors = ToTensors(INFO, torch.device("cpu"), channels_last=False)
    plan = ShardPlan(batch, 1, total, rank=0, world_size=1)
    return IndexedFeed(rows, SampleOrder(0, num_samples), plan, to_tensors, Augment(AugmentConfig(), 0))


def shown(batch):
    return np.rint(batch.micro_batches[0].images[:, 0, 0, 0].numpy() * 255).astype(int).tolist()


def settled(count):
    """Return the count once it hasn't changed for two seconds."""
    last, since = count(), time.monotonic()

    def has_stood_still():
        nonlocal last, since
        if (now := count()) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 2

    wait_until(has_stood_still)
    return last


def test_what_nobody_takes_is_not_decoded(tmp_path):
    reads = Numbered(tmp_path)
    with closing(feed(tmp_path, 100_000, 16, 10**9).from_position(0)) as batches:
        next(batches)
        first = settled(reads.num_reads)
        for _ in range(60):  # 960 samples: after these, tasks have full size
            next(batches)
        ahead = settled(reads.num_reads) - 61 * 16
    assert first < 8 * _UNIT_ROWS
    # running and waiting tasks (two each), handed-over and read rows; twice that where two spans meet
    assert ahead < 16 * _UNIT_ROWS


def test_a_task_that_is_killed_is_done_again_and_changes_nothing(tmp_path):
    for number in (40, 333, 700):
        (tmp_path / f"kills.{SampleOrder(0, 1000).samples(np.array([number]))[0]}").touch()
    with closing(feed(tmp_path, 1000, 50, 2000).from_position(0)) as batches:
        found = [(batch.start, batch.samples.tolist(), shown(batch)) for batch in batches]
    expected = SampleOrder(0, 1000).samples(np.arange(2000)).reshape(40, 50)
    assert [start for start, _, _ in found] == list(range(0, 2000, 50))
    assert [samples for _, samples, _ in found] == expected.tolist()
    assert [pixels for *_, pixels in found] == (expected % 251).tolist()
    assert not list(tmp_path.glob("kills.*")), "all three struck"


def test_epochs_follow_one_another_in_one_pipeline_and_it_can_begin_in_any(tmp_path):
    """Batches cross the ends of epochs, which are shorter than a task and than a batch."""
    made = feed(tmp_path, 7, 10, 95)
    whole = [(b.start, b.end, b.samples.tolist(), shown(b)) for b in made.from_position(0)]
    assert [(start, end) for start, end, *_ in whole] == [(s, min(s + 10, 95)) for s in range(0, 95, 10)]
    samples = [sample for *_, samples, _ in whole for sample in samples]
    assert samples == SampleOrder(0, 7).samples(np.arange(95)).tolist()
    for position in (10, 40, 90):
        assert [(b.start, b.end, b.samples.tolist(), shown(b)) for b in made.from_position(position)] == [
            batch for batch in whole if batch[0] >= position
        ]


def test_a_pass_that_is_left_ends_its_pipeline(tmp_path):
    def pipelines():
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]

    batches = feed(tmp_path, 100_000, 16, 10**9).from_position(0)
    next(batches)
    assert pipelines()
    batches.close()
    wait_until_none(pipelines)  # a thread of the pool may hold the iterator for a moment


def test_a_worker_that_finds_no_cpu_to_decode_on_says_so_and_goes_on_when_there_is_one(tmp_path, monkeypatch):
    @ray.remote(num_cpus=2)
    class Everything:
        def held(self):
            return True

    monkeypatch.setattr(stream, "_SLOW_S", 0.2)
    told = queue.Queue()
    spec = SimpleNamespace(config=Config(), info=INFO, decode_cpus=1)
    channel, group = SimpleNamespace(send=told.put), SimpleNamespace(rank=3, world_size=1)
    rows = _rows(spec, dict.fromkeys(SPLITS, split_of(tmp_path, 40)), channel, group)["train"]
    other = Everything.remote()
    assert ray.get(other.held.remote())
    wait_until_none(lambda: ray.available_resources().get("CPU", 0))  # Ray reports it after a moment
    samples = np.arange(40)
    with rows.open(iter([request(samples, samples)])) as take, ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take, samples)
        event = told.get(timeout=60).event
        assert not taking.done()
        ray.kill(other)
        taken = taking.result(timeout=60)
    assert (event.name, event.rank) == ("slow_data", 3)
    why = r"nothing decoded for \d+ s: none of the cluster's 2 CPUs is free to decode on\."
    assert re.match(why, event.reason), event
    assert taken.labels.tolist() == (samples % 2).tolist()
