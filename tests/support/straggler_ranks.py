"""Program of tests/unit/test_stragglers.py: two ranks train, one of them slow in one section of its steps."""

import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

from ftexp.config.schema import ModelConfig
from ftexp.job.stopwatch import FEED, FORWARD
from ftexp.wire import events
from ftexp.worker.log import log_train
from ftexp.worker.loop import advance
from ftexp.worker.ranks import RankTimes
from ftexp.worker.step import thaw, train_step
from tests.support.jobs import SMALL_VIT
from tests.support.sharded_ranks import job_of

WORLD, NUM_STEPS, SLOW_S = 2, 7, 0.12
WITH_BUFFERS = ModelConfig(name="test_byobnet")
CASES = [  # parallel.kind, model, slow rank, its slow section
    ("ddp", SMALL_VIT, 1, FORWARD),
    ("ddp", SMALL_VIT, 0, FEED),
    ("ddp", WITH_BUFFERS, 0, FEED),  # the other rank waits in its forward pass for the buffers of rank 0
    ("fsdp", SMALL_VIT, 1, FORWARD),
]


def slowly(batches, part, rank_is_slow):
    for batch in batches:
        if rank_is_slow and part == FEED:
            time.sleep(SLOW_S)
        yield batch


def train(rank):
    torch.set_num_threads(1)  # in each rank: threads that start at once break the thread pool inherited by a fork
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{os.environ['MEETING']}")
    for kind, model, slow_rank, part in CASES:
        is_slow = rank == slow_rank
        job = job_of(kind, rank, WORLD, NUM_STEPS, model=model, freeze={"blocks.0": 2} if model is SMALL_VIT else {})
        job.config.train.log_every_steps = 10  # so that MIN_POINTS points make a straggler; here every step is logged
        ranks = RankTimes(job)
        feed = job.data.feed.from_position(0)
        for batch in job.stopwatch.feeding(slowly(feed, part, is_slow), lambda job=job: job.progress.position):
            if thaw(job):
                ranks.watch()
            if is_slow and part == FORWARD:
                time.sleep(SLOW_S)
            train_step(job, batch)
            advance(job, batch)
            log_train(job, ranks)
        told = [event for event in job.channel.events() if isinstance(event, (events.Straggler, events.StragglerOver))]
        if rank == 0:
            (event,) = told
            assert (event.rank, event.part) == (slow_rank, part), event
            *_, point = (sent.values for sent in job.channel.points())
            assert point["slowest_rank"] == slow_rank
            assert point["rank_ms_max"] > 1000 * SLOW_S > point["rank_ms_min"] == point["rank_ms_median"], point
        else:
            assert not told
    dist.destroy_process_group()
    if rank == 0:
        print("the slow ranks were found")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(train, nprocs=WORLD, start_method="fork")
