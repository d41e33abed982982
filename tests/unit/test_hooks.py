"""Hooks: when they are called, their saved state, and how they and early stopping end a run."""

import contextlib
import math
from types import SimpleNamespace

import pytest

from ftexp.checkpoint.restore import restore
from ftexp.config.checks.validate import validate
from ftexp.config.fingerprint import fingerprint
from ftexp.config.schema import Config, StoppingConfig
from ftexp.driver.resume import open_run
from ftexp.errors import ConfigError, UnknownNameError
from ftexp.job import hook_registry
from ftexp.job.early_stopping import EarlyStopping, check_measured
from ftexp.job.hook_registry import Hook, check_hooks, register_hook
from ftexp.job.progress import Progress
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import FINISHED, RunState
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import Happened
from ftexp.worker import validation
from ftexp.worker.batches import feeding
from ftexp.worker.evaluation import evaluate
from ftexp.worker.loop import run_steps
from tests.support.configs import composed
from tests.support.jobs import copied, make_job, manager_of, same

WATCHDOG = SimpleNamespace(beat=lambda _: None, during=lambda _: contextlib.nullcontext())


@pytest.fixture
def register(monkeypatch):
    """Function that registers hooks for one test."""
    monkeypatch.setattr(hook_registry._hooks, "_entries", {})
    return register_hook


def begun(job, directory):
    """Restore the job from its latest checkpoint; return its CheckpointManager."""
    checkpoints, store = manager_of(job, directory)
    restore(job, store, checkpoints)
    return checkpoints


def run(job, directory, steps=None):
    """Run to the end, or stop after `steps` as if the process were killed."""
    checkpoints = begun(job, directory)
    batches = feeding(job, Storage.at(str(directory)))
    if steps is not None:
        batches = (batch for _, batch in zip(range(steps), batches, strict=False))
    saves = checkpoints.save
    checkpoints.save = lambda: (saves(), checkpoints.wait())
    run_steps(job, batches, checkpoints, WATCHDOG)
    return job


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch):
    monkeypatch.setattr("ray.train.report", lambda *_: None)


def worse(monkeypatch, values):
    """Patch evaluation so that the validation loss of epoch n is values[n]."""

    def measured(job, split):
        evaluate(job, split)
        job.progress.metrics["val_loss"] = values[job.progress.epoch]

    monkeypatch.setattr(validation, "evaluate", measured)


def test_a_hook_is_called_at_its_points_in_the_order_of_the_loop(register, tmp_path):
    calls = []

    @register("watch")
    class Watch(Hook):
        def __init__(self, context, name):
            super().__init__(context)
            self.name = name

        def after_step(self):
            calls.append((self.context.progress.step, "step"))

        def after_evaluation(self, step, epoch):
            assert "val_loss" in self.context.progress.metrics
            calls.append((step, "evaluation", epoch))

        def before_save(self):
            calls.append((self.context.progress.step, "save"))

    run(make_job(hooks={"watch": {"name": "x"}}), tmp_path)
    expected = [(step, "step") for step in range(1, 13)]
    for end in (4, 8, 12):
        at = expected.index((end, "step")) + 1
        expected[at:at] = [(end, "evaluation", end // 4), (end, "save")]
    assert calls == expected


def test_what_a_hook_counts_is_resumed_from_the_checkpoint(register, tmp_path):
    @register("count")
    class Count(Hook):
        def __init__(self, context):
            super().__init__(context)
            self.steps = []

        def after_step(self):
            self.steps.append(self.context.progress.step)

        def state_dict(self):
            return {"steps": list(self.steps)}

        def load_state_dict(self, state):
            self.steps = list(state["steps"])

    run(make_job(hooks={"count": {}}), tmp_path, steps=6)  # saved after 4
    resumed = run(make_job(hooks={"count": {}}), tmp_path)
    assert resumed.hooks.state_dict()["hooks"] == {"count": {"steps": [*range(1, 13)]}}
    run(make_job(), tmp_path)  # a run whose hooks were removed resumes, and saves no hook state


def test_a_run_without_hooks_saves_what_it_saved(tmp_path):
    job = run(make_job(), tmp_path / "run")
    _, store = manager_of(job, tmp_path / "run")
    assert set(store.latest(lambda *_: None).state_versions) == {"progress"}
    # a run to which hooks were added resumes
    stopping = run(make_job(stopping=StoppingConfig(metric="val_loss", patience_epochs=1)), tmp_path / "run")
    assert stopping.progress.step == job.progress.step


def test_a_request_of_rank_0_ends_the_run_as_if_the_step_were_its_last(register, tmp_path):
    @register("stop")
    class Stop(Hook):
        def after_step(self):
            if self.context.progress.step == 6:
                self.context.request_stop("enough")

    job = run(make_job(hooks={"stop": {}}, log_every_steps=4), tmp_path)
    assert (job.progress.step, job.progress.finished, job.progress.stopped) == (6, True, "enough")
    (event,) = job.channel.events(events.StoppedEarly)
    assert (event.step, event.epoch, event.reason, event.rules["hooks"]) == (6, 1, "enough", {"stop": {}})
    points = [(point.split, point.step) for point in job.channel.points()]
    assert points == [("train", 4), ("val", 4), ("train", 6), ("val", 6)]
    assert job.channel.events(events.CheckpointSaved)[-1].reasons == ["end"]
    again = run(make_job(hooks={"stop": {}}), tmp_path)
    assert (again.progress.step, again.progress.finished) == (6, True)
    assert again.channel.events(events.StoppedEarly)[0].reason == "enough"


STOPPING = {"metric": "val_loss", "patience_epochs": 1}


def test_a_run_stops_at_the_same_step_with_the_same_weights_after_a_kill(monkeypatch, tmp_path):
    worse(monkeypatch, {1: 0.5, 2: 0.6, 3: 0.7})
    clean = run(make_job(stopping=StoppingConfig(**STOPPING)), tmp_path / "clean")
    assert (clean.progress.step, clean.progress.epoch) == (8, 2)
    assert clean.progress.stopped == "val_loss has not improved for 1 epoch (best 0.5000 at epoch 1)"
    run(make_job(stopping=StoppingConfig(**STOPPING)), tmp_path / "killed", steps=6)
    killed = run(make_job(stopping=StoppingConfig(**STOPPING)), tmp_path / "killed")
    assert (killed.progress.step, killed.progress.stopped) == (8, clean.progress.stopped)
    assert same(copied(clean), copied(killed))
    assert killed.hooks.state_dict() == clean.hooks.state_dict()


def test_a_run_that_stopped_early_trains_on_once_stopping_is_changed(monkeypatch, tmp_path):
    worse(monkeypatch, {1: 0.5, 2: 0.6, 3: 0.7})
    whole = run(make_job(), tmp_path / "whole")
    run(make_job(stopping=StoppingConfig(**STOPPING)), tmp_path / "run")
    longer = StoppingConfig(metric="val_loss", patience_epochs=2)
    resumed = run(make_job(stopping=longer), tmp_path / "run")
    assert (resumed.progress.step, resumed.progress.epoch) == (12, 3)
    assert same(copied(whole), copied(resumed))
    assert not resumed.channel.events(events.StoppedEarly)  # it was the last step anyway
    # raising train.epochs doesn't make it continue: with that value from the start, it would have stopped here too
    assert resumed.progress.stopped == "val_loss has not improved for 2 epochs (best 0.5000 at epoch 1)"


@pytest.mark.parametrize(
    ("settings", "values", "stops_at"),
    [
        ({}, [3, 2, 2, 2, 1], 4),
        ({"min_delta": 0.5}, [3, 2.6, 2.5, 9], 3),  # compared with the best: 2.6 and 2.5 improve by too little
        ({"metric": "val_accuracy"}, [0.3, 0.4, 0.2, 0.4], 4),
        ({"metric": "val_accuracy", "mode": "min"}, [0.3, 0.4, 0.2, 0.4], None),
        ({"metric": "val_calibration_error"}, [0.3, 0.4, 0.5], 3),
        ({}, [math.nan, math.nan], 2),
        ({}, [math.nan, 2, math.nan, 1], None),
    ],
)
def test_patience_counts_epochs_since_the_best(settings, values, stops_at):
    asked, progress = [], Progress(None, 100)
    config = Config(stopping=StoppingConfig(**{"metric": "val_loss", "patience_epochs": 2, **settings}))
    context = SimpleNamespace(config=config, progress=progress, request_stop=lambda _: asked.append(progress.epoch))
    hook = EarlyStopping(context)
    for epoch, value in enumerate(values, 1):
        progress.epoch, progress.metrics = epoch, {config.stopping.metric: value}
        hook.after_evaluation(4 * epoch, epoch)
        hook.after_evaluation(4 * epoch + 1, epoch)  # as if train.max_steps ended the run within an epoch
        assert hook.state_dict()["metric"] == config.stopping.metric
        other = EarlyStopping(context)  # as after a restart
        other.load_state_dict(hook.state_dict())
        hook = other
    assert (asked[0] if asked else None) == stops_at


def test_epochs_between_those_that_are_evaluated_dont_count():
    asked, progress = [], Progress(None, 100)
    config = Config(stopping=StoppingConfig(metric="val_loss", patience_epochs=4))
    config.train.eval_every_epochs = 2
    hook = EarlyStopping(SimpleNamespace(config=config, progress=progress, request_stop=asked.append))
    for epoch, value in ((1, 1.0), (2, 3.0), (4, 3.5), (5, 2.0)):  # 1 and 5: epochs at which invocations ended
        progress.metrics = {"val_loss": value}
        hook.after_evaluation(9, epoch)
    assert (asked, hook.state_dict()["best"]) == ([], 3.0)
    hook.after_evaluation(9, 6)
    assert hook.state_dict()["best_epoch"] == 6


def state_after(tmp_path, config, stopped_by):
    storage = Storage.at(str(tmp_path))
    state = RunState(name="x", fingerprint=fingerprint(config), epoch=2, step=8, attempts=1)
    record = RunRecord(storage, state, ("val_loss", "min"))
    rules = {"stopping": vars(stopped_by), "hooks": {}}
    record.handle(Happened(events.StoppedEarly(8, 2, "val_loss has not improved", rules)))
    record.close(FINISHED)
    return open_run(config, storage, "x")


def test_a_run_that_stopped_early_is_finished_until_stopping_is_changed(tmp_path):
    config = composed("stopping.metric=val_loss", "stopping.patience_epochs=1", "train.epochs=5")
    state = state_after(tmp_path, config, config.stopping)
    assert (state.status, state.stopped["step"], state.stopped["epoch"]) == ("finished", 8, 2)
    state = state_after(tmp_path, config, StoppingConfig(metric="val_loss", patience_epochs=2))
    assert (state.status, state.stopped) == ("running", None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stopping.metric=val_los"], "stopping.metric=val_los is not a logged metric. Did you mean 'val_loss'?"),
        (["stopping.metric=val_auroc"], "stopping.metric=val_auroc is only logged with train.metrics=[auroc]"),
        (["stopping.metric=test_loss"], "stopping.metric=test_loss is measured only once, at the end of the run"),
        (["stopping.metric=val_loss_ema"], "stopping.metric=val_loss_ema is a metric of the EMA: set ema.d"),
        (["stopping=early", "stopping.mode=max"], "stopping.metric=val_loss is best at its minimum, but stopping.mode"),
        (["stopping=early", "train.epochs=10"], "stopping.patience_epochs=10 must be below train.epochs=10"),
        (
            ["stopping.patience_epochs=3"],
            "stopping.patience_epochs=3 needs stopping.metric: set stopping.metric, or re",
        ),
        (["+hooks.mine.every=3"], "hooks names mine, but no plug-in is imported: add plugins=[...]"),
    ],
)
def test_stopping_that_would_be_ignored_is_refused_in_one_line(overrides, expected):
    with pytest.raises(ConfigError) as refused:
        validate(composed(*overrides))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_hooks_are_checked_once_plug_ins_are_imported(register):
    @register("mine")
    class Mine(Hook):
        def __init__(self, context, every):
            super().__init__(context)

    with pytest.raises(UnknownNameError, match=r"hooks='mien' is unknown\. Did you mean 'mine'"):
        check_hooks({"mien": {}})
    with pytest.raises(ConfigError, match=r"hooks\.mine=\{\} doesn't fit the hook's arguments: missing .* 'every'"):
        check_hooks({"mine": {}})
    with pytest.raises(ConfigError, match="unexpected keyword argument 'evry'"):
        check_hooks({"mine": {"every": 3, "evry": 3}})
    check_hooks({"mine": {"every": 3}})
    with pytest.raises(ValueError, match=r"must be a subclass of ftexp\.plugins\.Hook"):
        register("other")(object)
    with pytest.raises(ValueError, match=r"'early_stopping' is ftexp's own"):
        register("early_stopping")(Mine)


def test_data_without_a_validation_split_cannot_stop_a_run():
    with pytest.raises(ConfigError, match=r"^stopping\.metric=val_loss is never measured"):
        check_measured("val_loss", {"train": 5, "val": 0})
    check_measured("train_loss", {"train": 5, "val": 0})
    check_measured(None, {"train": 5, "val": 0})
