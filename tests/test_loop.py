"""One optimiser step in one process: every switch of `train` trains, and accumulation changes no result."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from ftexp.config import AugmentConfig, CheckpointConfig, Config, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from ftexp.data.augment import Augment
from ftexp.data.feeds import CachedFeed, Plan, Rows, ToTensors
from ftexp.data.order import Order
from ftexp.data.splits import DataInfo
from ftexp.job import Job
from ftexp.loop import advance, evaluate, evaluation_due, log_train, train_step, update_best
from ftexp.models import build_model
from ftexp.optim import build_optimizer, build_scheduler
from ftexp.progress import Meter, Progress

CPU = torch.device("cpu")
SMALL_VIT = ModelConfig(
    name="vit_tiny_patch16_224", kwargs={"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
)
RESNET = ModelConfig(name="resnet18")


class Lines:
    """Collects what a worker would send to the driver."""

    def __init__(self):
        self.sent = []

    def send(self, kind, **fields):
        self.sent.append({"kind": kind, **fields})


def make_job(model=SMALL_VIT, num_samples=96, batch=24, optim=None, **train):
    config = Config(
        model=model,
        optim=optim or OptimConfig(name="adamw", lr=3e-3),
        schedule=ScheduleConfig(name="constant"),
        train=TrainConfig(epochs=3, global_batch_size=batch, **train),
        checkpoint=CheckpointConfig(),
    )
    info = DataInfo(["dark", "light"], 8, 1, [0.5], [0.25], {})
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_samples) % 2
    pixels = torch.randint(0, 100, (num_samples, 8, 8, 1), generator=generator) + 120 * labels.view(-1, 1, 1, 1)
    block = {
        "image": pixels.to(torch.uint8).numpy(),
        "label": labels.numpy(),
        "sample": torch.arange(num_samples).numpy(),
    }
    rows = Rows(SimpleNamespace(iter_batches=lambda **_: iter([block])))
    torch.manual_seed(0)
    built, _ = build_model(config.model, info)
    if config.train.channels_last:
        built = built.to(memory_format=torch.channels_last)
    if config.train.compile:
        built.compile()
    optimizer = build_optimizer(config.optim, built)
    total = 3 * num_samples
    to_tensors = ToTensors(info, CPU, config.train.channels_last)
    plan = Plan(batch, config.train.accumulate_steps, total, 0, 1)
    return Job(
        config=config, info=info, run_name="x", attempt=1, rank=0, world_size=1, device=CPU, line=Lines(),
        model=built, wrapped=built, optimizer=optimizer,
        scheduler=build_scheduler(config.schedule, optimizer, math.ceil(total / batch), num_samples / batch),
        scaler=torch.amp.GradScaler("cpu", enabled=config.train.precision == "fp16"),
        feed=CachedFeed(rows, Order(0, num_samples), plan, to_tensors, Augment(AugmentConfig(), 0)),
        rows={"train": rows, "val": rows, "test": rows}, to_tensors=to_tensors, total_positions=total,
        progress=Progress(Meter(CPU)),
    )  # fmt: skip


def train(job):
    ends = []
    for batch in job.feed.from_position(job.progress.position):
        train_step(job, batch)
        ends.append(advance(job, batch))
    return ends


SWITCHES = [
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"channels_last": True},
    {"label_smoothing": 0.1},
    {"clip_grad_norm": 0.5},
    {"accumulate_steps": 3},
    {"precision": "fp16", "clip_grad_norm": 1.0, "accumulate_steps": 2},
    {},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_learns_what_can_be_learned(switches):
    job = make_job(**switches)
    ends = train(job)
    evaluate(job, "val")
    assert job.progress.metrics["val_accuracy"] > 0.95
    assert (job.progress.step, job.progress.position, job.progress.epoch) == (12, 288, 3)
    assert ends == [False, False, False, True] * 3


def test_a_compiled_model_takes_the_steps_of_the_plain_one():
    shallow = dataclasses.replace(SMALL_VIT, kwargs={**SMALL_VIT.kwargs, "depth": 1})
    plain, compiled = make_job(shallow), make_job(shallow, compile=True)
    for job in (plain, compiled):
        train_step(job, next(job.feed.from_position(0)))
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def gradients_of_one_step(batch=24, **switches):
    job = make_job(batch=batch, optim=OptimConfig(name="sgd", lr=1e-9), **switches)
    train_step(job, next(job.feed.from_position(0)))
    return {name: parameter.grad for name, parameter in job.model.named_parameters()}


@pytest.mark.parametrize("batch", [24, 25, 5])
def test_accumulated_gradients_are_those_of_the_whole_batch(batch):
    whole, parts = gradients_of_one_step(batch), gradients_of_one_step(batch, accumulate_steps=4)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_norm():
    clipped = gradients_of_one_step(clip_grad_norm=1e-3)
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in clipped.values()]))
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_batch_norm_trains_when_the_last_batch_has_a_single_row():
    job = make_job(RESNET, num_samples=25, batch=37, optim=OptimConfig(name="sgd", lr=0.01))
    assert [job.total_positions % 37, job.total_positions] == [1, 75]
    train(job)
    assert job.progress.position == 75
    assert all(torch.isfinite(value).all() for value in job.model.state_dict().values())


def test_dropout_depends_on_step_and_rank_alone():
    dropping = dataclasses.replace(SMALL_VIT, kwargs={**SMALL_VIT.kwargs, "proj_drop_rate": 0.5})

    def weights_after_step(rank=0, noise=0, step=5):
        job = make_job(dropping)
        job.rank, job.progress.step = rank, step
        torch.rand(noise)  # whatever else drew numbers before
        train_step(job, next(job.feed.from_position(0)))
        return torch.cat([parameter.flatten() for parameter in job.model.parameters()])

    assert torch.equal(weights_after_step(), weights_after_step(noise=7))
    assert not torch.equal(weights_after_step(), weights_after_step(rank=1))
    assert not torch.equal(weights_after_step(), weights_after_step(step=6))


def test_the_logged_loss_is_the_mean_since_the_last_point():
    job = make_job()
    batches = job.feed.from_position(0)
    expected = []
    for _ in range(3):
        batch = next(batches)
        with torch.no_grad():
            logits = job.model(batch.micro_batches[0].images)
        expected.append(torch.nn.functional.cross_entropy(logits, batch.micro_batches[0].labels).item())
        train_step(job, batch)
        advance(job, batch)
    log_train(job)
    (point,) = job.line.sent
    assert (point["split"], point["step"]) == ("train", 3)
    assert point["values"]["train_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    log_train(job)
    assert math.isnan(job.line.sent[1]["values"]["train_loss"])


@pytest.mark.parametrize(("order", "best_step"), [("max", 2), ("min", 3)])
def test_the_best_step_is_remembered(order, best_step):
    job = make_job()
    job.config.checkpoint.checkpoint_score_order = order
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.9), (5, float("nan"))):
        job.progress.step, job.progress.metrics["val_accuracy"] = step, accuracy
        update_best(job)
    assert job.best["step"] == best_step


def test_the_last_epoch_is_evaluated_whatever_the_cadence():
    job = make_job(eval_every_epochs=2)
    due = []
    for epoch in (1, 2, 3):
        job.progress.epoch, job.progress.position = epoch, epoch * 96
        due.append(evaluation_due(job))
    assert due == [False, True, True]


def test_an_empty_split_is_not_evaluated():
    job = make_job()
    job.rows["test"] = Rows(SimpleNamespace(iter_batches=lambda **_: iter([])))
    evaluate(job, "test")
    assert job.line.sent == []
