"""Optimiser steps in one process: every switch of `train` trains, and accumulation doesn't change the result."""

import dataclasses
import functools
import math
import os
from types import SimpleNamespace

import pytest
import torch

from ftexp.chaos.strike import poisoned
from ftexp.config.schema import (
    AugmentConfig,
    OptimConfig,
)
from ftexp.data.feeds.feed import CachedRows
from ftexp.data.order import SampleOrder
from ftexp.errors import ConfigError, NonFiniteError
from ftexp.evaluation.meter import Meter
from ftexp.failure.watchdog import hang_reporter
from ftexp.job.build import settle_kernels
from ftexp.job.group import ProcessGroup
from ftexp.job.job import RunIdentity
from ftexp.job.progress import Progress
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened, Hung
from ftexp.worker.evaluation import evaluate, evaluation_due
from ftexp.worker.log import log_train
from ftexp.worker.loop import advance
from ftexp.worker.step import train_step
from tests.support.jobs import (
    ALONE,
    CPU,
    RESNET,
    SMALL_VIT,
    Lines,
    copied,
    make_job,
    manager_of,
    recovery_of,
    same,
    skipping_job,
    train,
)


class Pair(torch.nn.Module):
    """Returns its logits twice in training mode if `mode`, else in evaluation mode."""

    def __init__(self, inner, mode):
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, images):
        logits = self.inner(images)
        return (logits, logits) if self.training == self.mode else logits


def test_a_model_that_returns_a_tuple_is_refused_in_the_first_step_and_evaluation():
    job = make_job()
    job.learner.wrapped = Pair(job.learner.model, mode=True)
    with pytest.raises(ConfigError, match=r"^model\.name=vit_tiny_patch16_224 returns a tuple of 2, not logits"):
        train(job)
    job.learner.model = Pair(job.learner.model, mode=False)
    with pytest.raises(ConfigError, match=r"returns a tuple of 2, not logits"):
        evaluate(job, "val")


@pytest.mark.parametrize(
    ("configured", "accumulate_steps", "now", "largest"),
    [(None, 1, 1, 96), (None, 4, 4, 24), (64, 4, 4, 64), (None, 1, 4, 24), (64, 1, 4, 24), (10, 1, 4, 10)],
)
def test_an_evaluation_takes_as_much_at_a_time_as_surely_has_room(
    monkeypatch, configured, accumulate_steps, now, largest
):
    job, sizes = make_job(eval_batch_size=configured, accumulate_steps=accumulate_steps), []
    job.data.accumulate_steps = now  # more than configured after an earlier lack of memory
    job.learner.model.register_forward_pre_hook(lambda _, images: sizes.append(len(images[0])))
    evaluate(job, "val")
    assert max(sizes) == largest
    assert sum(sizes) == 96


def test_a_gpus_kernels_are_asked_for_the_same_bits_each_time(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        settle_kernels(CPU)
        assert not torch.are_deterministic_algorithms_enabled()
        settle_kernels(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # other operations still run
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


SWITCHES = [
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"channels_last": True},
    {"label_smoothing": 0.1},
    {"clip_grad_norm": 0.5},
    {"accumulate_steps": 3},
    {"precision": "fp16", "clip_grad_norm": 1.0, "accumulate_steps": 2},
    {"clip_grad_value": 0.01},
    {"clip_grad_agc": 0.1},
    {"freeze": {"blocks.0": 1}},
    {"augment": AugmentConfig(mixup_alpha=0.2, erase_prob=0.25), "label_smoothing": 0.1, "accumulate_steps": 2},
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


def test_a_compiled_model_takes_the_steps_of_the_plain_one(monkeypatch):
    # traced and differentiated as usual, but without compiling C++, which takes half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    shallow = dataclasses.replace(SMALL_VIT, kwargs={**SMALL_VIT.kwargs, "depth": 1})
    plain, compiled = make_job(shallow), make_job(shallow, compile=True)
    for job in (plain, compiled):
        train_step(job, next(job.data.feed.from_position(0)))
    assert list(plain.learner.model.state_dict()) == list(compiled.learner.model.state_dict())
    for name, value in plain.learner.model.state_dict().items():
        torch.testing.assert_close(compiled.learner.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def gradients_of_one_step(batch=24, **switches):
    job = make_job(batch=batch, optim=OptimConfig(name="sgd", lr=1e-9), **switches)
    train_step(job, next(job.data.feed.from_position(0)))
    return {name: parameter.grad for name, parameter in job.learner.model.named_parameters()}


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
    assert [job.progress.total_positions % 37, job.progress.total_positions] == [1, 75]
    train(job)
    assert job.progress.position == 75
    assert all(torch.isfinite(value).all() for value in job.learner.model.state_dict().values())


def test_dropout_depends_on_step_and_rank_alone():
    dropping = dataclasses.replace(SMALL_VIT, kwargs={**SMALL_VIT.kwargs, "proj_drop_rate": 0.5})

    def weights_after_step(rank=0, noise=0, step=5):
        batch = next(make_job(dropping).data.feed.from_position(0))
        job = make_job(dropping, group=dataclasses.replace(ALONE, rank=rank))
        job.progress.step = step
        torch.rand(noise)  # other draws from the global generator
        train_step(job, batch)
        return torch.cat([parameter.flatten() for parameter in job.learner.model.parameters()])

    assert torch.equal(weights_after_step(), weights_after_step(noise=7))
    assert not torch.equal(weights_after_step(), weights_after_step(rank=1))
    assert not torch.equal(weights_after_step(), weights_after_step(step=6))


def test_the_logged_loss_is_the_mean_since_the_last_point():
    job = make_job()
    batches = job.data.feed.from_position(0)
    expected = []
    for _ in range(3):
        batch = next(batches)
        with torch.no_grad():
            logits = job.learner.model(batch.micro_batches[0].images)
        expected.append(torch.nn.functional.cross_entropy(logits, batch.micro_batches[0].labels).item())
        train_step(job, batch)
        advance(job, batch)
    log_train(job)
    (point,) = job.channel.sent
    assert (point.split, point.step) == ("train", 3)
    assert point.values["train_loss"] == pytest.approx(sum(expected) / 3, rel=1e-5)
    log_train(job)
    assert math.isnan(job.channel.sent[1].values["train_loss"])


@pytest.mark.parametrize(("order", "best_step"), [("max", 2), ("min", 3)])
def test_the_best_step_is_remembered(order, best_step):
    progress = Progress(Meter(CPU), 96)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.9), (5, float("nan"))):
        progress.step, progress.metrics["val_accuracy"] = step, accuracy
        progress.update_best("val_accuracy", order)
    assert progress.best == {"metric": "val_accuracy", "value": {2: 0.9, 3: 0.1}[best_step], "step": best_step}


def test_the_last_epoch_is_evaluated_whatever_the_cadence():
    job = make_job(eval_every_epochs=2)
    due = []
    for epoch in (1, 2, 3):
        job.progress.epoch, job.progress.position = epoch, epoch * 96
        due.append(evaluation_due(job, epoch_ended=True))
    assert due == [False, True, True]


def test_a_run_that_stops_in_an_epoch_is_evaluated_there_and_nowhere_else_in_it():
    job = make_job()
    job.progress.total_positions = 96 + 48  # train.max_steps=6
    due = []
    for batch in job.data.feed.from_position(0):
        due.append(evaluation_due(job, advance(job, batch)))
        if job.progress.finished:
            break
    assert due == [False, False, False, True, False, True]


def test_a_poisoned_step_is_not_a_number():
    job = make_job(accumulate_steps=3)
    batches = job.data.feed.from_position(0)
    train_step(job, next(batches))
    assert all(torch.isfinite(parameter).all() for parameter in job.learner.model.parameters())
    train_step(job, poisoned(next(batches)))
    assert all(parameter.grad.isnan().all() for parameter in job.learner.model.parameters())


def test_a_batch_tells_which_samples_it_counts():
    job = make_job(accumulate_steps=5, batch=7)  # micro-batches of one row are padded
    order, told = SampleOrder(0, 96), []
    for batch in job.data.feed.from_position(0):
        assert batch.positions.tolist() == list(range(batch.start, batch.end))
        assert batch.samples.tolist() == order.samples(batch.positions).tolist()
        assert len(batch.samples) == sum(int((micro.weights > 0).sum()) for micro in batch.micro_batches)
        told += batch.samples.tolist()
    assert sorted(told) == sorted(3 * list(range(96)))


def test_an_empty_split_is_not_evaluated():
    job = make_job()
    job.data.rows["test"] = CachedRows(SimpleNamespace(iter_batches=lambda **_: iter([])))
    evaluate(job, "test")
    assert job.channel.sent == []


def poisoned_step(job, batches, recovery=None):
    batch = poisoned(next(batches))
    if not train_step(job, batch):
        (recovery or recovery_of(job)).recover(batch)
    advance(job, batch)


@pytest.mark.parametrize(
    "switches", [{}, {"accumulate_steps": 3}, {"clip_grad_norm": 0.5}, {"precision": "bf16"}], ids=str
)
def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_the_next_one_does(switches):
    job = skipping_job(**switches)
    batches = job.data.feed.from_position(0)
    batch = next(batches)
    train_step(job, batch)
    advance(job, batch)
    weights, sums = copied(job), job.progress.train.taken()
    recovery = recovery_of(job)
    poisoned_step(job, batches, recovery)
    assert same(copied(job), weights)
    assert torch.equal(job.progress.train.taken(), sums)  # neither its losses nor its samples were counted
    assert all(parameter.grad is None for parameter in job.learner.model.parameters())
    assert (job.progress.step, job.progress.position, recovery.num_skipped) == (
        2,
        48,
        1,
    )  # its samples are skipped, though
    assert job.channel.sent == [Happened(events.StepSkipped([24, 48], 2, "the gradient is not finite"))]
    train_step(job, next(batches))
    assert not same(copied(job), weights)
    log_train(job)
    assert math.isfinite(job.progress.metrics["train_loss"])


def test_without_a_bad_gradient_skipping_changes_no_bit():
    plain, skipping = make_job(), skipping_job()
    train(plain), train(skipping)
    assert same(copied(plain), copied(skipping))


def test_a_bad_image_leaves_batch_norms_statistics_alone():
    job = skipping_job(RESNET, optim=OptimConfig(name="sgd", lr=0.01))
    before, batch = copied(job), next(job.data.feed.from_position(0))
    batch.micro_batches[0].images[3, 0, 0, 0] = math.nan
    assert not train_step(job, batch)
    assert same(copied(job), before)


def test_too_many_skipped_steps_in_a_row_are_an_error_and_as_many_in_all_are_not():
    job = skipping_job(most=2)
    batches, recovery = job.data.feed.from_position(0), recovery_of(job)
    for _ in range(2):
        poisoned_step(job, batches, recovery)
    batch = next(batches)
    train_step(job, batch)
    recovery.recovered()
    advance(job, batch)
    for _ in range(2):
        poisoned_step(job, batches, recovery)
    expected = "3 steps in a row had a gradient that is not finite, the last of them step 6, and .*_nonfinite_steps=2"
    with pytest.raises(NonFiniteError, match=expected):
        poisoned_step(job, batches, recovery)


def test_only_rank_0_tells_of_a_skipped_step():
    job = skipping_job(group=dataclasses.replace(ALONE, rank=1, world_size=2))
    recovery = recovery_of(job)
    poisoned_step(job, job.data.feed.from_position(0), recovery)
    assert (recovery.num_skipped, job.channel.sent) == (1, [])


def test_where_steps_are_not_skipped_a_bad_loss_is_an_error_when_it_would_be_logged():
    job = make_job()
    batches = job.data.feed.from_position(0)
    poisoned_step(job, batches)  # raises nothing yet: synchronising with the device at each step would cost time
    with pytest.raises(NonFiniteError, match="24 losses were NaN or infinite by step 1"):
        log_train(job)
    assert job.channel.sent == []


def test_nothing_is_saved_after_a_bad_loss(tmp_path):
    job = make_job()
    checkpoints, store = manager_of(job, tmp_path)
    poisoned_step(job, job.data.feed.from_position(0))
    with pytest.raises(NonFiniteError, match="24 losses were NaN or infinite by step 1: nothing was saved"):
        checkpoints.save()
    assert not checkpoints.busy
    assert store.latest(lambda *_: None) is None


def test_weights_that_are_not_finite_are_not_kept_as_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    job = make_job()
    job.channel.sync = lambda: None
    checkpoints, store = manager_of(job, tmp_path)
    job.progress.step = 1
    checkpoints.save()
    checkpoints.wait()
    with torch.no_grad():
        next(iter(job.learner.model.parameters())).view(-1)[0] = math.inf
    job.progress.step = 2
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waiting doesn't mend it"))
    job.progress.total_positions = 0  # so that this checkpoint is the last
    checkpoints.save()
    checkpoints.wait()
    saved, failed = job.channel.events()
    assert (type(saved), saved.step, failed.step) == (events.CheckpointSaved, 1, 2)
    assert "the weights are not finite" in failed.error
    assert store.latest(lambda *_: None).step == 1
    with pytest.raises(NonFiniteError, match=r"are not finite, so this step is not worth keeping: lower optim\.lr"):
        checkpoints.finish()  # the error doesn't blame the storage
    job.config.checkpoint.max_failed_saves = 0
    with pytest.raises(NonFiniteError, match="are not finite"):
        checkpoints.due(epoch_ended=False)


def test_a_request_to_stop_is_taken_up_after_a_step_and_saved_there(tmp_path):
    job = make_job()
    checkpoints, _ = manager_of(job, tmp_path)
    job.progress.step = 1
    assert (checkpoints.due(epoch_ended=False), checkpoints.stopping) == (False, False)
    job.channel.stop_requested = True
    due = []
    while not checkpoints.stopping:
        job.progress.step += 1
        due.append(checkpoints.due(epoch_ended=False))
    assert due[-1] is True
    assert not any(due[:-1])


def test_a_hang_is_told_and_its_stacks_are_left_in_the_run_directory(tmp_path):
    line, order = Lines(), []
    line.flush = lambda: order.append([*line.sent])
    run, group = RunIdentity("x", 2, {}), ProcessGroup(3, 4, CPU)
    report = hang_reporter(run, group, line, Storage.at(str(tmp_path)))
    report("in a step", 12.5, "the stacks")
    file = tmp_path / "hangs" / "a2.r3.txt"
    assert file.read_text() == "the stacks"
    assert order == [[Hung(3, "in a step", 12.5, str(file))]]  # the flush comes after the message
