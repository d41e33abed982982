"""Non-finite gradients: skipped batches, rollbacks, and that a restart keeps both."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftexp.checkpoint.build import state_context
from ftexp.checkpoint.compare import tree_differences
from ftexp.checkpoint.manager import CheckpointManager
from ftexp.checkpoint.registry import ExtraState
from ftexp.config.schema import AugmentConfig, EmaConfig, FailureConfig, OptimConfig
from ftexp.errors import NonFiniteError
from ftexp.failure.watchdog import Watchdog, hang_limits
from ftexp.job.skipped_batches import SkippedBatches
from ftexp.rundir.sample_ledger import SampleLedger, problems, read_updates
from ftexp.storage.directory import Storage
from ftexp.wire.events import CheckpointFailed, RolledBack, Thawed
from ftexp.worker.batches import batches
from ftexp.worker.loop import begin, run_steps
from tests.support.jobs import RESNET, copied, make_job, manager_of, same

BATCH = 24
STATES = ["progress", "scheduler", "scaler", "ema", "rng", "best"]


class BadFeed:
    """Batches of another feed; in each of `steps`, counted from 1, an image has a NaN."""

    def __init__(self, feed, steps):
        self.feed, self.steps = feed, steps

    def from_position(self, position):
        for batch in self.feed.from_position(position):
            if batch.end // BATCH in self.steps:
                batch.micro_batches[0].images[0, 0, 0, 0] = math.nan
            yield batch


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function that runs a job to its end, with bad images at some steps and a checkpoint every 3 steps."""
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    save = CheckpointManager.save
    # steps are faster than a checkpoint here, and a checkpoint that becomes due meanwhile would be postponed
    monkeypatch.setattr(CheckpointManager, "save", lambda self: (save(self), self.wait()))

    def start(policy, bad_steps=(), skips=(), name="run", model=None, recipe=None, **failure):
        job = make_job(model, optim=OptimConfig(name="sgd", lr=0.01)) if model else make_job(**recipe or {})
        if job.learner.scaler.is_enabled():
            job.learner.scaler = torch.amp.GradScaler(
                "cpu", init_scale=2.0**21, growth_interval=2
            )  # grows, and overflows
        job.config.failure = dataclasses.replace(job.config.failure, on_nonfinite=policy, **failure)
        job.config.checkpoint.every_steps, job.config.checkpoint.every_epochs = 3, None
        job.config.train.ledger, job.config.train.log_every_steps = True, 4
        job.data.feed, job.data.skipped = BadFeed(job.data.feed, bad_steps), SkippedBatches(skips)
        job = dataclasses.replace(job, ledger=SampleLedger(Storage.at(str(tmp_path), name, "ledger"), 1, 0))
        checkpoints, store = manager_of(job, tmp_path / name / "checkpoints", STATES)
        begin(job, store, checkpoints)
        run_steps(job, batches(job), checkpoints, Watchdog(hang_limits(FailureConfig()), print))
        job.ledger.flush()
        return job

    return start


def points(job):
    return {(point.split, point.step): point.values for point in job.channel.points()}


@pytest.mark.parametrize("model", [None, RESNET], ids=["vit", "resnet"])
def test_a_rollback_leaves_out_the_bad_batch_and_does_the_rest_again(run, model, tmp_path):
    skipped = run("skip_step", {5, 9}, name="skipped", model=model)
    rolled = run("rollback", {5, 9}, name="rolled", model=model)
    assert [(event.step, event.to_step, event.positions) for event in rolled.channel.events(RolledBack)] == [
        (5, 3, [96, 120]),
        (9, 6, [192, 216]),
    ]
    # both policies skip a single bad batch, and replayed steps have the same result
    assert same(copied(rolled), copied(skipped))
    assert points(rolled) == points(skipped)
    assert rolled.progress.finished
    updates = read_updates(Storage.at(str(tmp_path), "rolled"))
    assert [update.step for update in updates if update.skipped] == [5, 9]
    assert list(problems(updates, 96, BATCH)) == []
    assert updates == read_updates(Storage.at(str(tmp_path), "skipped"))


def test_a_rollback_takes_the_average_fp16s_scaler_and_what_was_unfrozen_back_with_it(run):
    recipe = {
        "precision": "fp16",
        "ema": EmaConfig(decay=0.9, use_warmup=True),
        "freeze": {"blocks.0": 1},  # the fifth step is the first one that trains it
        "augment": AugmentConfig(mixup_alpha=0.8, erase_prob=0.5, erase_mode="pixel"),
    }
    skipped = run("skip_step", {5, 9}, name="skipped", recipe=recipe)
    rolled = run("rollback", {5, 9}, name="rolled", recipe=recipe)
    assert [(event.step, event.to_step) for event in rolled.channel.events(RolledBack)] == [(5, 3), (9, 6)]
    assert [event.epoch for event in rolled.channel.events(Thawed)] == [1, 0, 1]
    assert same(copied(rolled), copied(skipped))
    states = [ExtraState(["scaler", "ema"], state_context(job)).state_dict() for job in (rolled, skipped)]
    assert list(tree_differences(*states)) == []
    assert points(rolled) == points(skipped)
    assert 0 < rolled.progress.num_overflows < 10, "some of the ten steps were taken"


def test_bad_batches_in_a_row_are_blamed_on_those_before_them(run, tmp_path):
    job = run("rollback", {8, 9})
    found = [(event.step, event.to_step, event.positions) for event in job.channel.events(RolledBack)]
    # the second rollback also skips the batch before the first, but none from before the checkpoint of step 6
    assert found == [(8, 6, [168, 192]), (9, 6, [144, 216])]
    assert same(copied(job), copied(run("raise", skips=[(144, 216)], name="left out")))
    assert [update.step for update in read_updates(Storage.at(str(tmp_path), "run")) if update.skipped] == [7, 8, 9]


def test_the_first_steps_go_back_to_where_the_attempt_began(run):
    job = run("rollback", {1})
    assert [(event.to_step, event.positions) for event in job.channel.events(RolledBack)] == [(0, [0, 24])]
    assert same(copied(job), copied(run("raise", skips=[(0, 24)], name="left out")))


def test_rollbacks_to_one_save_have_a_limit(run):
    bad = {4, 5, 6, 7, 8}
    with pytest.raises(NonFiniteError, match=r"step 6 .* rollbacks to the same checkpoint .*max_rollbacks=2"):
        run("rollback", bad, max_rollbacks=2)
    # each checkpoint restarts the count
    assert run("rollback", {2, 5, 8, 11}, max_rollbacks=1, name="apart").progress.finished


def test_known_batches_are_left_out_whatever_the_policy_and_count_for_its_limit(run):
    left_out = run("raise", skips=[(96, 120)], name="known")
    assert same(copied(left_out), copied(run("skip_step", {5})))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row .* the last of them step 7"):
        run("skip_step", {7}, skips=[(96, 144)], max_nonfinite_steps=2, name="too many")
    # a step that isn't skipped restarts the count
    assert run("skip_step", {3, 5, 7}, max_nonfinite_steps=1, name="not in a row").progress.finished


def test_weights_that_are_not_finite_are_nothing_to_go_back_to(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    job = make_job()
    job.config.failure.on_nonfinite = "rollback"
    checkpoints, _ = manager_of(job, tmp_path, STATES)
    checkpoints.keep_in_memory()
    good = copied(job)
    with torch.no_grad():
        next(iter(job.learner.model.parameters())).view(-1)[0] = math.inf
    job.progress.step = 3
    checkpoints.save()
    (failed,) = job.channel.events(CheckpointFailed)
    assert "the weights are not finite" in failed.error
    for _ in range(2):  # the copy stays unchanged, even after the optimiser has used the restored state
        checkpoints.roll_back()
        assert same(copied(job), good)
        assert job.progress.step == 0
        job.learner.optimizer.step()
        with torch.no_grad():
            for parameter in job.learner.model.parameters():
                parameter += 1


def test_ranges_that_touch_become_one():
    skips = SkippedBatches([(48, 72), (0, 24)])
    assert [skips.cover(position) for position in (0, 23, 24, 47, 48, 71, 72)] == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    skips.add((24, 48))
    assert skips.widened(72, 96, 0) == (0, 96)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=8), st.integers(0, 40))
def test_what_was_added_is_covered_and_nothing_else(added, position):
    skips = SkippedBatches((start, start + length) for start, length in added)
    assert skips.cover(position) == any(start <= position < start + length for start, length in added)


@given(st.integers(0, 8), st.integers(0, 10))
def test_a_wider_range_holds_the_bad_batch_all_before_it_and_as_many_again(num_before, first):
    skips = SkippedBatches([(10, 10 + num_before)] if num_before else [])
    start, end = skips.widened(10 + num_before, 11 + num_before, first)
    assert end == 11 + num_before
    assert start == max(first, 10 - num_before)
