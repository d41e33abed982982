"""Program of tests/ray/test_replacing.py: ranks train, one is killed in a step, and only that one is started again.

Arguments: a directory, the number of ranks, the rank to kill, and the steps in which to kill it. With a +, the kill
comes after the optimiser's step, which the other ranks have taken too, but before the rank has reported it.
"""

import functools
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from ftexp.checkpoint.build import build_manager
from ftexp.checkpoint.store import CheckpointStore
from ftexp.config.schema import REPLACE, EmaConfig, FailureConfig
from ftexp.data.plan import ShardPlan
from ftexp.failure.meeting import MEETING, Invitation, common_step
from ftexp.failure.watchdog import Watchdog
from ftexp.job.group import ProcessGroup
from ftexp.job.stopwatch import SPEEDS
from ftexp.rundir.sample_ledger import SampleLedger, problems, read_updates
from ftexp.storage.directory import Storage
from ftexp.wire.messages import REPLACED, Ready
from ftexp.worker import replacing
from ftexp.worker.loop import begin, run_steps
from tests.support.jobs import copied, make_job, same

FREEZE, NUM_SAMPLES, BATCH, NUM_STEPS = {"blocks.0": 1}, 96, 24, 12
WAIT_S = 60.0


def job_of(folder, rank, world):
    job = make_job(
        freeze=FREEZE,
        group=ProcessGroup(rank, world, torch.device("cpu")),
        ema=EmaConfig(decay=0.9),
        num_samples=NUM_SAMPLES,
        batch=BATCH,
        log_every_steps=4,
    )
    object.__setattr__(job, "ledger", SampleLedger(Storage.at(str(folder)).child("ledger"), 1, rank))
    job.config.failure = FailureConfig(recovery=REPLACE)
    job.config.checkpoint.every_epochs = None
    job.channel.stop_requested = job.channel.save_requested = False
    job.channel.flush = lambda: None
    job.learner.wrap = functools.partial(DistributedDataParallel, gradient_as_bucket_view=True)
    job.data.feed._plan = ShardPlan(BATCH, 1, BATCH * NUM_STEPS, rank, world)
    if not job.group.is_awaited:
        job.learner.wrapped = job.learner.wrap(job.learner.model)
    return job


def dies_in(job, steps):
    loss = job.learner.loss

    def die_at(mark):
        if f"{job.progress.step + 1}{mark}" in steps:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*arguments):
        die_at("")
        return loss(*arguments)

    job.learner.loss = deadly
    job.learner.optimizer.register_step_post_hook(lambda *_: die_at("+"))


def train(folder, rank, world, steps):
    """Train to the end; return the job."""
    job = job_of(folder, rank, world)
    checkpoints = build_manager(job, CheckpointStore(Storage.at(str(folder)).child("checkpoints")))
    checkpoints.finish = lambda: None
    checkpoints.due = lambda _: False
    dies_in(job, steps)
    run = begin(job, checkpoints._store, checkpoints)
    batches = job.data.feed.from_position(job.progress.position)
    run_steps(job, batches, checkpoints, Watchdog({}, print), replacing=run)
    return job


def worker(pipe, folder, rank, world, steps, is_first):
    torch.set_num_threads(1)
    replacing._own_address = lambda: "127.0.0.1"
    threading.Thread(target=answer, args=(pipe,), daemon=True).start()
    if is_first:
        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/meeting")
    job = train(folder, rank, world, steps)
    sources = [message.source for message in job.channel.sent if isinstance(message, Ready)]
    points = [(point.step, comparable(point.values)) for point in job.channel.points()]
    torch.save({"state": copied(job), "sources": sources, "points": points}, f"{folder}/r{rank}.pt")
    pipe.send("ended")
    dist.destroy_process_group()


def comparable(values):
    return {name: value for name, value in values.items() if name not in SPEEDS}


def answer(pipe):
    """Answer requests from the pipe, as an actor's methods would."""
    while True:
        name, argument = pipe.recv()
        pipe.send(getattr(MEETING, name)(argument))


class Controller:
    def __init__(self, folder, world):
        self.folder, self.world, self.processes, self.pipes = folder, world, {}, {}

    def start(self, rank, steps, is_first):
        self.pipes[rank], theirs = torch.multiprocessing.Pipe()
        arguments = (theirs, self.folder, rank, self.world, steps, is_first)
        self.processes[rank] = torch.multiprocessing.get_context("fork").Process(target=worker, args=arguments)
        self.processes[rank].start()
        theirs.close()

    def ask(self, rank, name, argument):
        self.pipes[rank].send((name, argument))
        return self.pipes[rank].recv()

    def replace(self, rank, steps, number):
        self.processes[rank].join()
        self.start(rank, steps, is_first=False)
        found = [self.ask(other, "waiting", WAIT_S) for other in self.pipes if other != rank]
        assert common_step(found) is not None, found
        address = next(each.address for each in found if each.address is not None)
        for other in self.pipes:
            self.ask(other, "invite", Invitation(address, number, rank))


def run(folder, world, killed_rank, steps):
    Path(folder).mkdir(parents=True)
    controller = Controller(folder, world)
    for rank in range(world):
        controller.start(rank, steps[:1] if rank == killed_rank else [], is_first=True)
    for number in range(1, len(steps) + 1):
        controller.replace(killed_rank, steps[number : number + 1], number)
    for rank in range(world):
        assert controller.pipes[rank].recv() == "ended"
        controller.processes[rank].join()
    return [torch.load(f"{folder}/r{rank}.pt", weights_only=False) for rank in range(world)]


def main():
    folder, world, killed_rank, *steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
    clean = run(f"{folder}/clean", world, 0, [])
    replaced = run(f"{folder}/replaced", world, killed_rank, steps)
    for rank in range(world):
        assert same(clean[rank]["state"], replaced[rank]["state"]), f"rank {rank} ends elsewhere"
    assert clean[0]["points"] == replaced[0]["points"], (clean[0]["points"], replaced[0]["points"])
    assert replaced[0]["sources"] == ["start", *[REPLACED] * len(steps)]
    updates = read_updates(Storage.at(f"{folder}/replaced"))
    assert len(updates) == NUM_STEPS
    assert not list(problems(updates, NUM_SAMPLES, BATCH))
    assert updates == read_updates(Storage.at(f"{folder}/clean"))
    print("bitwise identical")


if __name__ == "__main__":
    main()
