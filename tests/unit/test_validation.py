"""Evaluation in parallel with training: the metrics that a run has at each step, for slow and failing evaluations."""

import dataclasses
import io
import queue
from types import SimpleNamespace

import numpy as np
import pytest
import ray.exceptions
import ray.train
from PIL import Image

from ftexp.checkpoint.restore import restore
from ftexp.cluster.resources import Workers, decide_workers, num_shares
from ftexp.config.checks.validate import validate as validate_config
from ftexp.config.schema import EmaConfig, ScalingConfig, StoppingConfig
from ftexp.data.info import IndexedSplit
from ftexp.driver import beside
from ftexp.driver.beside import Evaluations, EvaluationSpec, _evaluate, require_room
from ftexp.errors import CheckpointError, ConfigError, DataError
from ftexp.job.progress import Pending
from ftexp.rundir.names import CHECKPOINTS
from ftexp.sweep.run.runner import TrialProcess
from ftexp.wire import events
from ftexp.wire.messages import DAMAGED, FAILED, UNSAVED, EvaluateCheckpoint, Evaluated
from ftexp.worker.evaluation import evaluate
from ftexp.worker.validation import ask_again, settle, validate
from tests.support.configs import composed
from tests.support.jobs import make_job, manager_of, train

FIRST, SECOND = "step_00000004.a1", "step_00000008.a1"


def beside_job(**switches):
    job = make_job(eval="beside", **switches)
    job.progress.step, job.progress.epoch = 4, 1
    return job


def found(step, name, accuracy, **failure):
    values = {} if failure else {"val_accuracy": accuracy, "val_loss": 1 - accuracy}
    return Evaluated(step, step // 4, name, values, **failure)


def test_an_evaluation_counts_from_the_next_one_on_for_the_step_that_it_belongs_to():
    job = beside_job()
    validate(job)
    assert job.progress.pending == [Pending(4, 1, FIRST)]
    assert (job.progress.metrics, job.progress.best) == ({}, {})
    job.channel.note_evaluated(found(4, FIRST, 0.75))
    assert job.progress.metrics == {}  # not used before the next evaluation, however early it arrives
    job.progress.step, job.progress.epoch = 8, 2
    validate(job)
    assert job.progress.pending == [Pending(8, 2, SECOND)]
    assert job.progress.metrics == {"val_accuracy": 0.75, "val_loss": 0.25}
    assert job.progress.best == {"metric": "val_accuracy", "value": 0.75, "step": 4}
    job.channel.note_evaluated(found(8, SECOND, 0.5))
    settle(job)
    assert job.progress.pending == []
    assert job.progress.metrics["val_accuracy"] == 0.5
    assert job.progress.best["step"] == 4
    assert job.channel.points() == []  # the driver logs them


def test_a_run_stops_early_at_the_evaluation_after_the_one_that_did_not_improve():
    job = beside_job(stopping=StoppingConfig(metric="val_accuracy", patience_epochs=1))
    for epoch, accuracy in ((1, 0.75), (2, 0.5), (3, 0.9)):
        job.progress.step, job.progress.epoch = 4 * epoch, epoch
        assert job.progress.stopped is None
        validate(job)
        job.channel.note_evaluated(found(4 * epoch, f"step_{4 * epoch:08d}.a1", accuracy))
    (stopped,) = job.channel.events(events.StoppedEarly)
    assert (stopped.step, stopped.epoch) == (12, 3)
    assert stopped.reason == "val_accuracy has not improved for 1 epoch (best 0.7500 at epoch 1)"
    assert job.progress.pending[-1].step == 12  # the last checkpoint is evaluated too
    settle(job)
    assert (job.progress.metrics["val_accuracy"], job.progress.best["step"]) == (0.9, 12)


def test_a_run_that_is_to_stop_waits_for_no_evaluation_and_its_state_holds_what_is_pending():
    job = beside_job()
    validate(job)
    job.progress.step, job.progress.epoch = 8, 2
    validate(job)  # the channel returns None: a stop was requested
    state = job.progress.state_dict()
    assert state["pending"] == [{"step": 4, "epoch": 1}, {"step": 8, "epoch": 2}]
    other = make_job()
    other.progress.load_state_dict(state, 0)
    assert other.progress.pending == [Pending(4, 1, ""), Pending(8, 2, "")]


def test_without_pending_evaluations_a_state_is_what_it_was_before_there_were_any():
    job = make_job()
    validate(job)
    assert set(job.progress.state_dict()) == {"epoch", "step", "position", "train", "metrics"}
    assert job.progress.pending == []
    assert [point.split for point in job.channel.points()] == ["val"]


def test_what_a_restored_run_waits_for_is_evaluated_from_the_newest_checkpoint_of_its_step(tmp_path):
    for attempt in (1, 2):
        job = make_job(attempt=attempt, eval="beside")
        manager, store = manager_of(job, tmp_path)
        job.progress.step, job.progress.epoch = 4, 1
        job.progress.pending = [Pending(2, 0, "gone"), Pending(4, 1, f"step_00000004.a{attempt}")]
        assert manager.due(epoch_ended=False)
        save(manager)
        assert job.channel.sent[-1] == EvaluateCheckpoint(4, 1, f"step_00000004.a{attempt}")
    job = make_job(attempt=3, eval="beside")
    manager, store = manager_of(job, tmp_path)
    restore(job, store, manager)
    ask_again(job, store)
    wanted = [message for message in job.channel.sent if isinstance(message, EvaluateCheckpoint)]
    assert wanted == [EvaluateCheckpoint(2, 0, "step_00000002.a0"), EvaluateCheckpoint(4, 1, "step_00000004.a2")]
    assert [pending.checkpoint for pending in job.progress.pending] == [each.checkpoint for each in wanted]


def test_a_checkpoint_stays_until_it_is_evaluated(tmp_path):
    job = beside_job()
    manager, store = manager_of(job, tmp_path)
    validate(job)
    for step in (4, 5, 6, 7):
        job.progress.step = step
        save(manager)
    assert sorted(store.storage.list_directories()) == [FIRST, "step_00000006.a1", "step_00000007.a1"]
    job.channel.note_evaluated(Evaluated(4, 1, FIRST, {"val_loss": 1.0}))
    settle(job)
    job.progress.step = 8
    save(manager)
    assert sorted(store.storage.list_directories()) == ["step_00000007.a1", SECOND]


def save(manager):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray.train, "report", lambda _: None)
        manager.save()
        manager.wait()


def test_a_checkpoint_that_can_not_be_saved_is_reported_as_not_evaluated(tmp_path, monkeypatch):
    job = make_job(eval="beside")
    manager, store = manager_of(job, tmp_path)
    validate(job)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(store), "write", fail)
    save(manager)
    settle(job)
    assert job.progress.pending == []
    (event,) = job.channel.events(events.EvaluationFailed)
    assert event == events.EvaluationFailed(0, "its checkpoint was not saved")


def test_a_checkpoint_damaged_since_this_attempt_saved_it_makes_the_run_resume_from_the_one_before():
    job = beside_job()
    validate(job)
    job.channel.note_evaluated(found(4, FIRST, 0, failure=DAMAGED, problem="model.pt differs"))
    with pytest.raises(CheckpointError, match=rf"^checkpoint {FIRST} could not be evaluated: model\.pt differs"):
        settle(job)


@pytest.mark.parametrize(("failure", "attempt"), [(DAMAGED, 2), (UNSAVED, 1)])
def test_an_evaluation_that_nothing_can_bring_back_is_an_event_and_the_run_continues(failure, attempt):
    job = beside_job(attempt=attempt)
    job.progress.pending = [Pending(4, 1, FIRST)]
    job.channel.note_evaluated(found(4, FIRST, 0, failure=failure, problem="why"))
    settle(job)
    assert (job.progress.pending, job.progress.best) == ([], {})
    assert job.channel.events(events.EvaluationFailed) == [events.EvaluationFailed(4, "why")]


def test_an_evaluation_that_raises_ends_the_attempt():
    job = beside_job()
    validate(job)
    job.channel.note_evaluated(found(4, FIRST, 0, failure=FAILED, problem="KeyError: 'x'"))
    with pytest.raises(RuntimeError, match=r"^evaluation of checkpoint step_00000004\.a1 failed: KeyError: 'x'$"):
        settle(job)


def test_without_a_validation_split_what_training_logged_still_selects_the_best():
    for where in ("inline", "beside"):
        job = make_job(eval=where)
        job.data.rows["val"] = []
        job.config.checkpoint.checkpoint_score_attribute, job.config.checkpoint.checkpoint_score_order = (
            "train_loss",
            "min",
        )
        job.progress.step, job.progress.metrics = 4, {"train_loss": 0.5}
        assert validate(job)
        assert job.progress.best == {"metric": "train_loss", "value": 0.5, "step": 4}
        assert job.progress.pending == []


def test_a_run_that_is_to_stop_while_it_waits_ends_at_this_step():
    job = beside_job()
    assert validate(job)
    job.progress.step, job.progress.epoch = 8, 2
    assert not validate(job)
    job.channel.note_evaluated(found(4, FIRST, 0.5))
    assert settle(job, max_pending=1)
    assert job.progress.pending == [Pending(8, 2, SECOND)]
    assert job.progress.best["step"] == 4


def test_evaluations_of_before_count_where_the_workers_evaluate_since(tmp_path):
    job = make_job()
    job.progress.step, job.progress.epoch, job.progress.pending = 8, 2, [Pending(4, 1, FIRST)]
    job.channel.note_evaluated(found(4, FIRST, 1.0))
    assert validate(job)
    assert job.progress.best["step"] == 4
    assert job.progress.metrics["val_accuracy"] != 1.0
    assert job.progress.pending == []


def test_a_rollback_still_knows_the_checkpoint_that_is_evaluated(tmp_path):
    job = beside_job()
    job.config.failure.on_nonfinite = "rollback"
    manager, _ = manager_of(job, tmp_path)
    validate(job)
    save(manager)
    manager.roll_back()
    assert job.progress.pending == [Pending(4, 1, FIRST)]


def test_a_save_that_is_given_up_before_it_is_written_is_reported_as_not_evaluated(tmp_path):
    job = make_job(eval="beside", ledger=True)
    manager, _ = manager_of(job, tmp_path)
    validate(job)

    def fail():
        raise OSError("disk full")

    job.ledger.flush = fail
    manager.save()
    settle(job)
    assert job.channel.events(events.EvaluationFailed) == [events.EvaluationFailed(0, "its checkpoint was not saved")]


class Tasks:
    """Replaces Ray's task: calls return or raise `results` in turn."""

    def __init__(self, *results):
        self.results, self.checkpoints, self.cancelled = list(results), [], []

    def remote(self, _, checkpoint):
        self.checkpoints.append(checkpoint)
        return len(self.checkpoints) - 1

    def get(self, number):
        result = self.results[number]
        if isinstance(result, Exception):
            raise result
        return result


@pytest.fixture
def evaluations(monkeypatch):
    """Function that makes `Evaluations` with a recording hub, and tasks with given results."""

    def make(*results):
        tasks, told = Tasks(*results), queue.Queue()
        hub = SimpleNamespace(take=lambda _: True, broadcast=told.put)
        job = make_job(eval="beside")
        made = Evaluations(
            EvaluationSpec(job.config, job.info, "runs/x", None, None), Workers(1, False, {"CPU": 1}), hub
        )
        made._task = tasks
        monkeypatch.setattr(beside.ray, "get", tasks.get)
        monkeypatch.setattr(beside.ray, "cancel", lambda task, force: tasks.cancelled.append((task, force)))
        return made, tasks, lambda: told.get(timeout=20)

    return make


WANTED = EvaluateCheckpoint(4, 1, FIRST)


def test_a_checkpoint_is_evaluated_once_and_whoever_asks_again_is_told(evaluations):
    made, tasks, told = evaluations({"val_loss": 1.0})
    made.request(WANTED)
    assert told() == Evaluated(4, 1, FIRST, {"val_loss": 1.0})
    made.request(WANTED)
    assert told() == Evaluated(4, 1, FIRST, {"val_loss": 1.0})
    assert tasks.checkpoints == [FIRST]


@pytest.mark.parametrize("error", [OSError("the store is down"), ray.exceptions.WorkerCrashedError()])
def test_an_evaluation_that_failed_is_tried_again_when_a_restart_asks(evaluations, error):
    made, tasks, told = evaluations(error, {"val_loss": 1.0})
    made.request(WANTED)
    assert told().failure == FAILED
    made.request(WANTED)
    assert told() == Evaluated(4, 1, FIRST, {"val_loss": 1.0})
    assert tasks.checkpoints == [FIRST, FIRST]


def test_a_store_that_does_not_answer_is_asked_again_before_the_workers_hear_of_it(evaluations, monkeypatch):
    monkeypatch.setattr(beside, "_RETRY_AFTER_S", (0, 0))
    down = ray.exceptions.RayTaskError("evaluate", "", ConnectionError("the store is down"))
    made, tasks, told = evaluations(down, down, {"val_loss": 1.0}, down, down, down)
    made.request(WANTED)
    assert told() == Evaluated(4, 1, FIRST, {"val_loss": 1.0})
    assert tasks.checkpoints == [FIRST] * 3
    other = EvaluateCheckpoint(8, 2, "other")
    made.request(other)
    assert told() == Evaluated(8, 2, "other", failure=FAILED, problem="ConnectionError: the store is down")


def test_a_damaged_checkpoint_is_told_apart(evaluations):
    damaged = ray.exceptions.RayTaskError("evaluate", "", CheckpointError("model.pt differs"))
    made, _, told = evaluations(damaged)
    made.request(WANTED)
    assert (told().failure, damaged.cause.args) == (DAMAGED, ("model.pt differs",))


def test_nothing_is_asked_for_once_the_run_is_closed(evaluations):
    made, tasks, _ = evaluations({"val_loss": 1.0})
    made._running.add("task")
    made.close()
    made.request(WANTED)
    assert (tasks.checkpoints, tasks.cancelled) == ([], [("task", True)])


@pytest.mark.parametrize(("num_cpus", "expected"), [(2, (1, 1)), (4, (2, 1)), (8, (2, 3)), (1, (1, 1))])
def test_workers_leave_a_cpu_for_the_evaluation(num_cpus, expected):
    workers = decide_workers(ScalingConfig(use_gpu=False), num_cpus, spare=1)
    assert (workers.num_workers, workers.num_threads) == expected


def test_trials_side_by_side_leave_a_cpu_for_the_evaluation_of_each(monkeypatch):
    monkeypatch.setattr("ftexp.cluster.resources.usable_cpus", lambda: 8)
    configs = [dataclasses.replace(make_job(eval=where).config, scaling=ScalingConfig(use_gpu=False))
               for where in ("beside", "beside", "beside", "inline", "inline")]  # fmt: skip
    assert num_shares(configs, None) == 4
    trial = TrialProcess(None, configs[0], [], decide_workers(configs[0].scaling, 8, share=4, spare=1), None)
    assert trial.needs == {"CPU": 2}


@pytest.mark.parametrize("key", ["checkpoint.checkpoint_score_attribute", "stopping.metric"])
def test_a_training_metric_decides_nothing_where_checkpoints_are_evaluated_besides_training(key):
    order = ["checkpoint.checkpoint_score_order=min"] if key.startswith("checkpoint") else []
    validate_config(composed(f"{key}=train_loss", *order))
    with pytest.raises(ConfigError, match=rf"^{key}=train_loss is not measured by train\.eval=beside"):
        validate_config(composed(f"{key}=train_loss", *order, "train.eval=beside"))


def read(items):
    for item in items.tolist():
        yield f"{item}.png", lambda item=item: png(item)


def png(item):
    if item == 5:
        raise OSError("truncated")
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), item * 9, np.uint8)).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """(a trained job, its EvaluationSpec, the store with its checkpoint)."""
    monkeypatch.setattr(beside.ray, "get_gpu_ids", list)
    job = make_job(eval="beside", eval_batch_size=96, ema=EmaConfig(decay=0.9))
    manager, store = manager_of(job, tmp_path / CHECKPOINTS, ("progress", "ema"))
    train(job)
    save(manager)
    return job, EvaluationSpec(job.config, job.info, str(tmp_path), None, None), store


def test_a_task_measures_a_checkpoint_and_its_ema_as_the_workers_would(saved, monkeypatch):
    job, spec, store = saved
    evaluate(job, "val")
    monkeypatch.setattr(beside, "_rows", lambda _: job.data.rows["val"])
    values = _evaluate(spec, store.storage.list_directories()[0])
    assert values == job.channel.points()[-1].values
    assert set(values) == {"val_loss", "val_accuracy", "val_loss_ema", "val_accuracy_ema"}
    assert values["val_loss"] != values["val_loss_ema"]


def test_a_task_refuses_a_checkpoint_that_was_damaged(saved):
    _, spec, store = saved
    (name,) = store.storage.list_directories()
    content = bytearray(store.storage.child(name).read_bytes("model.pt"))
    content[100] ^= 1
    store.storage.child(name).write_bytes("model.pt", bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        _evaluate(spec, name)


@pytest.mark.parametrize(("on_bad_sample", "num_counted"), [("skip", 5), ("fail", 0)])
def test_files_are_decoded_in_the_task_itself_and_bad_ones_excluded_or_refused(on_bad_sample, num_counted, tmp_path):
    job = make_job()
    samples = np.arange(6)
    split = IndexedSplit(6, read, SimpleNamespace(get=lambda: (samples, samples % 2)), None)
    data = dataclasses.replace(job.config.data, on_bad_sample=on_bad_sample)
    config = dataclasses.replace(job.config, data=data)
    rows = beside._rows(EvaluationSpec(config, job.info, str(tmp_path), None, split))
    if not num_counted:
        with pytest.raises(DataError, match=r"5\.png: OSError: truncated"):
            rows.open(iter([])).__enter__()(samples)
        return
    taken = rows.open(iter([])).__enter__()(samples)
    assert taken.images[:, 0, 0, 0].tolist() == [0, 9, 18, 27, 36, 0]
    assert taken.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert taken.readable.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("cluster", "workers", "lacks"),
    [
        ({"CPU": 2}, Workers(1, False, {"CPU": 1}), None),
        (
            {"CPU": 2},
            Workers(2, False, {"CPU": 1}),
            "1 CPU besides the workers, and 2 workers take 2 of",
        ),
        ({"CPU": 2}, Workers((1, 2), False, {"CPU": 1}), "2 workers take 2"),
        ({"CPU": 9, "GPU": 2}, Workers(1, True, {"CPU": 1, "GPU": 1}), None),
        ({"CPU": 9, "GPU": 2}, Workers(2, True, {"CPU": 1, "GPU": 1}), "1 GPU besides the workers, and"),
    ],
)
def test_a_cluster_without_room_for_the_evaluation_is_refused(monkeypatch, cluster, workers, lacks):
    monkeypatch.setattr(beside.ray, "cluster_resources", lambda: cluster)
    config = make_job(eval="beside").config
    if lacks is None:
        require_room(config, workers)
        return
    with pytest.raises(ConfigError, match=rf"^train\.eval=beside needs .*{lacks}.*train\.eval=inline$"):
        require_room(config, workers)
    require_room(make_job().config, workers)


def test_rows_in_memory_are_read_from_the_dataset():
    block = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.array([1, 0]), "sample": np.arange(2)}
    dataset = SimpleNamespace(iterator=lambda: SimpleNamespace(iter_batches=lambda **_: iter([block])))
    job = make_job()
    rows = beside._rows(EvaluationSpec(job.config, job.info, "runs/x", dataset, None))
    assert rows.labels.tolist() == [1, 0]
