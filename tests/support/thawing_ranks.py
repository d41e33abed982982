"""Program of tests/unit/test_recipe.py: three ranks train a model whose parts thaw, and resume from a step between."""

import copy
import os

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from ftexp.data.plan import ShardPlan
from ftexp.job.group import ProcessGroup
from ftexp.worker.loop import advance
from ftexp.worker.step import settle_gradient_order, thaw, train_step
from tests.support.jobs import copied, make_job, same

WORLD, FREEZE, KEPT_AT = 3, {"blocks.0": 1, "patch_embed": 2}, 6


def rank_of(rank, world):
    job = make_job(freeze=FREEZE, group=ProcessGroup(rank, world, torch.device("cpu")))
    job.learner.wrap = lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)
    job.data.feed._plan = ShardPlan(24, 1, 288, rank, world)
    job.learner.wrapped = job.learner.wrap(job.learner.model)
    settle_gradient_order(job)
    return job


def go_on(job):
    kept = None
    for batch in job.data.feed.from_position(job.progress.position):
        if job.progress.step == KEPT_AT:
            parts = (job.learner.model, job.learner.optimizer, job.progress)
            kept = copy.deepcopy([part.state_dict() for part in parts])
        thaw(job)
        train_step(job, batch)
        advance(job, batch)
    return kept


def train(rank):
    torch.set_num_threads(1)  # in each rank: threads that start at once break the thread pool inherited by a fork
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, init_method=f"file://{os.environ['MEETING']}")
    clean = rank_of(rank, WORLD)
    kept = go_on(clean)
    resumed = rank_of(rank, WORLD)
    resumed.learner.model.load_state_dict(kept[0])
    resumed.learner.optimizer.load_state_dict(kept[1])
    resumed.progress.load_state_dict(kept[2], rank)
    go_on(resumed)
    assert same(copied(clean), copied(resumed)), "the run that went on ends elsewhere"
    dist.destroy_process_group()
    if rank == 0:
        alone = make_job(freeze=FREEZE)
        go_on(alone)
        for ours, theirs in zip(copied(clean), copied(alone), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
        print("as one process, and as without a stop")


if __name__ == "__main__":
    torch.multiprocessing.start_processes(train, nprocs=WORLD, start_method="fork")
