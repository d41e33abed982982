"""Program of tests/ray/test_sharding.py: ranks train a model under DDP, FSDP2 and hybrid FSDP2, and resume."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from ftexp.checkpoint.reading import cut
from ftexp.checkpoint.sharding import gathered, like_parameters, like_tree
from ftexp.config.schema import EmaConfig, ModelConfig, OptimConfig, ParallelConfig
from ftexp.data.plan import ShardPlan
from ftexp.job.group import ProcessGroup
from ftexp.job.trained_model import build_trained_model
from ftexp.model.parallel.parts import local
from ftexp.worker.evaluation import evaluate
from ftexp.worker.loop import advance
from ftexp.worker.step import settle_gradient_order, thaw, train_step
from tests.support.jobs import CPU, make_job, same

VIT = ModelConfig(name="vit_tiny_patch16_224", kwargs={"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2})
RESNET = ModelConfig(name="test_resnet")
SWITCHES = {
    "all": {
        "clip_grad_norm": 0.5,
        "accumulate_steps": 2,
        "freeze": {"blocks.0": 1, "patch_embed": 2},
        "ema": EmaConfig(decay=0.9, use_warmup=True),
    },
    "recomputed": {"clip_grad_value": 0.01, "checkpoint_activations": "every_2", "num_steps": 6},
    "fp16": {"precision": "fp16", "clip_grad_norm": 1.0, "num_steps": 6},
    # few steps: batch norm over few pixels amplifies differences in rounding
    "batch norm": {
        "model": RESNET,
        "num_steps": 3,
        "optim": OptimConfig(name="sgd", lr=0.01, kwargs={"momentum": 0.9}),
    },
}
KEPT_AT = 6


def job_of(kind, rank, world, num_steps=12, **switches):
    """Return a rank's job; the batches don't depend on the world size."""
    parallel = ParallelConfig(kind=kind, shard_size=2 if kind == "hsdp" else None)
    group = ProcessGroup(rank, world, CPU)
    job = make_job(**{"model": VIT, **switches}, parallel=parallel, group=group, num_samples=91)
    job.data.feed._plan = ShardPlan(24, switches.get("accumulate_steps", 1), min(24 * num_steps, 273), rank, world)
    if kind == "ddp":
        job.learner.model.load_state_dict(build_trained_model(job.config, job.info, CPU, world).model.state_dict())
        if job.learner.ema is not None:
            job.learner.ema.begin_at(job.learner.model)
        job.learner.wrap = lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)
        job.learner.wrapped = job.learner.wrap(job.learner.model)
    settle_gradient_order(job)
    return job


def state_of(job):
    """Return the state of model, optimiser and EMA, with whole tensors."""
    learner = job.learner
    parts = [learner.model.state_dict(), learner.optimizer.state_dict()]
    parts += [learner.ema.model.state_dict()] if learner.ema is not None else []
    return gathered(parts, keeps=True)


def go_on(job):
    """Train to the end; return the sum of losses after each step, the last metrics, and the state at step KEPT_AT."""
    losses, kept = [], None
    for batch in job.data.feed.from_position(job.progress.position):
        if job.progress.step == KEPT_AT:
            kept = (state_of(job), job.progress.state_dict())
        thaw(job)
        assert train_step(job, batch)
        losses.append(job.progress.train.totals()[0])
        if advance(job, batch):
            evaluate(job, "val")
    evaluate(job, "val")
    return losses, dict(job.progress.metrics), kept


def tensors_of(state):
    """Return the tensors of a nested state dict, in its order."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [each for part in state for each in tensors_of(part)] if isinstance(state, (list, tuple)) else []


def compare(rank, world, kinds):
    """Compare training under `kinds`; return {kind: (job, metrics, state at KEPT_AT)} of the switches "all"."""
    trained = {}
    for name, switches in SWITCHES.items():
        expected = None
        for kind in kinds:
            job = job_of(kind, rank, world, **switches)
            begun = tensors_of(state_of(job)[0])
            losses, metrics, kept = go_on(job)
            if name == "all":
                trained[kind] = (job, metrics, kept)
            found = (torch.tensor(losses), torch.tensor(list(metrics.values())), tensors_of(state_of(job)))
            if expected is None:
                expected, first = found, begun
                continue
            assert same(begun, first), f"{name}: {kind} begins with other weights"
            rtol = 1e-2 if name == "fp16" else 1e-5
            torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0, msg=f"{name}: losses of {kind}")
            torch.testing.assert_close(found[1], expected[1], rtol=10 * rtol, atol=1e-5)
            for ours, theirs in zip(found[2], expected[2], strict=True):
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=2e-3)
    return trained


def holds_a_part(job):
    learner = job.learner
    held = sum(local(each).numel() for each in learner.model.parameters())
    in_all = sum(each.numel() for each in learner.model.parameters())
    assert held < 0.5 * in_all
    averaged = sum(local(each).numel() for each in learner.ema.model.parameters())
    assert averaged == held
    moments = [value for state in learner.optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(local(each).numel() for each in moments) <= 2 * held


def resume(rank, world, clean, metrics, kept_at):
    """Resume at KEPT_AT and train; the result must be bitwise identical to the uninterrupted job."""
    kept, progress = kept_at
    kind = clean.config.parallel.kind
    resumed = job_of(kind, rank, world, **SWITCHES["all"])
    learner = resumed.learner
    learner.model.load_state_dict(cut(kept[0], like_tree(learner.model.state_dict())))
    learner.optimizer.load_state_dict(cut(kept[1], like_parameters(learner.optimizer)))
    average = learner.ema.model
    average.load_state_dict(cut(kept[2], like_tree(average.state_dict())))
    resumed.progress.load_state_dict(progress, rank)
    go_on(resumed)
    assert resumed.progress.metrics == metrics
    assert same(tensors_of(state_of(clean)), tensors_of(state_of(resumed))), f"{kind} resumed ends elsewhere"


def skip(rank, world):
    """A step that is non-finite on one rank changes nothing on any rank, and the next step succeeds."""
    job = job_of("fsdp", rank, world)
    job.config.failure.on_nonfinite = "skip_step"
    batches = list(job.data.feed.from_position(0))
    assert train_step(job, batches[0])
    before = tensors_of(state_of(job))
    bad = batches[1]
    if rank == world - 1:
        bad.micro_batches[0].images[0] = float("nan")
    assert not train_step(job, bad)
    assert same(before, tensors_of(state_of(job)))
    assert train_step(job, batches[2])


def run(rank, world):
    torch.set_num_threads(1)  # in each rank: threads that start at once break the thread pool inherited by a fork
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{os.environ['MEETING']}{world}")
    if world == 4:
        trained = compare(rank, world, ("ddp", "fsdp", "hsdp"))
        resume(rank, world, *trained["hsdp"])
        resume(rank, world, *trained["fsdp"])
    if world == 3:
        clean = job_of("fsdp", rank, world, **SWITCHES["all"])
        _, metrics, kept = go_on(clean)
        holds_a_part(clean)
        resume(rank, world, clean, metrics, kept)
        skip(rank, world)
    if world == 1:
        compare(rank, world, ("ddp", "fsdp"))
    dist.destroy_process_group()


if __name__ == "__main__":
    for world in map(int, sys.argv[1:]):
        torch.multiprocessing.start_processes(run, (world,), nprocs=world, start_method="fork")
        print(f"{world} ranks agree", flush=True)
