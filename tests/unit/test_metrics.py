"""Metrics of an evaluation: their values in one process and in three, and rejected names."""

import math

import pytest
import sklearn.metrics
import torch
from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

from ftexp.config.checks.metrics import logged_metrics
from ftexp.config.checks.validate import validate
from ftexp.config.schema import SINGLE_LABEL, EmaConfig
from ftexp.errors import ConfigError, UnknownNameError
from ftexp.evaluation import metric_registry
from ftexp.evaluation.metric_registry import check_metrics, check_names, check_num_classes, register_metric
from ftexp.evaluation.metrics import _MeanOfClasses
from ftexp.job.progress import Progress
from ftexp.worker.evaluation import evaluate
from tests.support.configs import composed
from tests.support.jobs import make_job
from tests.support.metric_ranks import NAMES, NUM_CLASSES, counted, made


@pytest.fixture
def own_metrics(monkeypatch):
    """Remove metrics registered by a test afterwards."""
    monkeypatch.setattr(metric_registry, "_kinds", dict(metric_registry._kinds))
    monkeypatch.setattr(metric_registry._metrics, "_entries", dict(metric_registry._metrics._entries))


@pytest.mark.parametrize("num_classes", [2, 7, NUM_CLASSES])
def test_metrics_are_those_of_scikit_learn(num_classes):
    logits, targets = made(num_classes)
    found = counted(logits, targets, 50, [name for name in NAMES if name != "top5" or num_classes > 5])
    probabilities, labels, predictions = logits.softmax(1).numpy(), targets.numpy(), logits.argmax(1).numpy()
    there = [label for label in range(num_classes) if 0 < (labels == label).sum() < len(labels)]

    def mean_of_classes(score):
        return (
            sum(score(labels == label, probabilities[:, label]) for label in there) / len(there) if there else math.nan
        )

    assert found["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"), rel=1e-6)
    # not from scikit-learn, which warns about predicted classes without samples
    recalls = [(predictions[labels == label] == label).mean() for label in sorted(set(labels))]
    assert found["balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls), rel=1e-12)
    assert found["auroc"] == pytest.approx(mean_of_classes(sklearn.metrics.roc_auc_score), rel=1e-6, nan_ok=True)
    assert found["average_precision"] == pytest.approx(
        mean_of_classes(sklearn.metrics.average_precision_score), rel=1e-6, nan_ok=True
    )
    if num_classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, logits.double().numpy(), k=5, labels=range(num_classes))
        # ties: of classes with equal logits, scikit-learn chooses others
        assert found["top5"] == pytest.approx(top5, abs=0.05)
        distinct = logits + torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) / 4
        top5 = sklearn.metrics.top_k_accuracy_score(labels, distinct.double().numpy(), k=5, labels=range(num_classes))
        assert counted(distinct, targets, 50, ["top5"])["top5"] == pytest.approx(top5, rel=1e-6)


def test_the_calibration_error_and_the_auroc_are_those_of_torchmetrics():
    logits, targets = made(7)
    logits[:40] *= 40  # with confidence 1
    expected = multiclass_calibration_error(logits.softmax(1), targets, 7)
    assert counted(logits, targets, 50, ["calibration_error"])["calibration_error"] == pytest.approx(
        float(expected), rel=1e-5
    )
    logits, targets = made(7)
    with pytest.warns(UserWarning, match="No positive samples"):
        each = multiclass_auroc(logits.softmax(1), targets, 7, average="none")
    assert counted(logits, targets, 50, ["auroc"])["auroc"] == pytest.approx(float(each[:6].mean()), rel=1e-5)


def test_a_split_without_samples_has_no_auroc():
    logits, targets = made(7)
    found = counted(logits[:0], targets[:0], 50, ["auroc", "average_precision"])
    assert all(math.isnan(value) for value in found.values())


def test_logits_that_are_not_finite_have_no_auroc_and_no_calibration_error():
    logits, targets = made(7)
    logits[3, 2] = math.nan
    assert all(math.isnan(value) for value in counted(logits, targets, 50, ["auroc", "calibration_error"]).values())


def test_three_workers_and_other_batches_measure_bitwise_what_one_process_measures(preloaded, tmp_path):
    """The process first checks that an evaluation without metrics doesn't import torchmetrics; this saves a process."""
    printed = preloaded.run("metric_ranks", MEETING=str(tmp_path / "meeting"))
    assert printed == "torchmetrics is not imported\nas one process\n"


def test_an_evaluation_logs_the_metrics_that_are_named_and_the_emas():
    job = make_job(ema=EmaConfig(decay=0.9), metrics=["auroc", "f1_macro"])
    evaluate(job, "val")
    (point,) = job.channel.points()
    names = [f"val_{name}{of}" for of in ("", "_ema") for name in ("loss", "accuracy")]
    assert [*point.values] == [*names, "val_auroc", "val_f1_macro", "val_auroc_ema", "val_f1_macro_ema"]
    assert set(point.values) <= set(logged_metrics(job.config))
    assert point.values["val_auroc"] == point.values["val_auroc_ema"]  # the model is untrained


def test_a_metric_of_ones_own_gets_logits_and_is_logged(own_metrics):
    @register_metric("gap", better="min")
    class Gap:
        def __init__(self, context):
            self.task, self.names, self.gaps = context.task, context.class_names, []

        def update(self, logits, targets):
            self.gaps += (logits.max(1).values - logits.gather(1, targets.unsqueeze(1)).squeeze(1)).tolist()

        def compute(self):
            assert (self.task, self.names) == ("single_label", ["dark", "light"])
            return sum(self.gaps) / len(self.gaps)

    @register_metric("mean_probability")
    def mean_probability(context):
        return _MeanOfClasses(context.predictions, lambda probabilities, _: float(probabilities.mean()))

    job = make_job(metrics=["gap", "mean_probability"])
    evaluate(job, "val")
    (point,) = job.channel.points()
    assert point.values["val_gap"] > 0
    assert point.values["val_mean_probability"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.metrics=[aurc]"], "train.metrics='aurc' is unknown. Did you mean 'auroc'? Available: top5, f1_macro"),
        (["train.metrics=[auroc,auroc]"], "train.metrics names auroc more than once"),
        (["train.metrics=[accuracy]"], "train.metrics names accuracy, which is always logged: remove it"),
        (["sweep.metric=val_auroc", "sweep.mode=max"], "is only logged with train.metrics=[auroc]: add auroc"),
        (
            ["checkpoint.checkpoint_score_attribute=val_f1_macro"],
            "checkpoint.checkpoint_score_attribute=val_f1_macro is only logged with train.metrics=[f1_macro]",
        ),
        (
            ["train.metrics=[auroc]", "checkpoint.checkpoint_score_attribute=test_auroc"],
            "checkpoint.checkpoint_score_attribute=test_auroc is measured only once, at the end",
        ),
        (
            ["train.metrics=[calibration_error]", "checkpoint.checkpoint_score_attribute=val_calibration_error"],
            "is best at its minimum, but checkpoint.checkpoint_score_order=max: set it to min",
        ),
        (
            ["train.metrics=[auroc]", "checkpoint.checkpoint_score_attribute=val_auroc_ema"],
            "is a metric of the EMA: set ema.decay",
        ),
    ],
)
def test_a_metric_that_is_not_logged_is_refused_in_one_line(overrides, expected):
    with pytest.raises(ConfigError) as refused:
        validate(composed(*overrides))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.metrics=[auroc]", "checkpoint.checkpoint_score_attribute=val_auroc"],
        ["train.metrics=[auroc]", "ema.decay=0.9", "checkpoint.checkpoint_score_attribute=val_auroc_ema"],
        ["train.metrics=[top5]", "sweep.metric=test_top5", "sweep.mode=max"],
        ["train.metrics=[kappa]", "plugins=[mine]", "checkpoint.checkpoint_score_attribute=val_kappa"],
    ],
)
def test_any_metric_that_is_logged_tells_the_best_or_the_objective(overrides):
    validate(composed(*overrides))


def test_metrics_of_plug_ins_are_checked_once_these_are_imported(own_metrics):
    config = composed("train.metrics=[regret]", "plugins=[x]", "checkpoint.checkpoint_score_attribute=val_regret")
    with pytest.raises(UnknownNameError, match=r"train\.metrics='regret' is unknown.*Available: auroc, average"):
        check_metrics(config, SINGLE_LABEL)
    register_metric("regret", better="min")(lambda _: None)
    with pytest.raises(ConfigError, match=r"val_regret is best at its minimum, and .*=max: set it to min"):
        check_metrics(config, SINGLE_LABEL)
    config.checkpoint.checkpoint_score_order = "min"
    check_metrics(config, SINGLE_LABEL)


def test_a_metric_that_does_not_fit_the_task_or_the_classes_is_refused(own_metrics):
    register_metric("map", tasks=("multi_label",))(lambda _: None)
    with pytest.raises(ConfigError, match=r"^metric map is for multi_label, and the task is single_label$"):
        check_names(["map"], SINGLE_LABEL)
    with pytest.raises(ConfigError, match=r"^metric top5 is always 1, since the data have 5 classes: remove it$"):
        check_num_classes(["top5"], 5)
    check_num_classes(["top5"], 6)
    for name in ("accuracy", "../kappa", "own_ema"):
        with pytest.raises(ValueError, match="must be an identifier, not loss or accuracy, and not end in _ema"):
            register_metric(name)
    with pytest.raises(ValueError, match="better='low' must be max or min"):
        register_metric("x", better="low")


def test_a_best_that_another_metric_told_is_replaced():
    progress = Progress(None, 10, metrics={"val_accuracy": 0.9, "val_auroc": 0.6}, step=1)
    progress.update_best("val_accuracy", "max")
    progress.step = 2
    progress.update_best("val_auroc", "max")
    assert progress.best == {"metric": "val_auroc", "value": 0.6, "step": 2}
