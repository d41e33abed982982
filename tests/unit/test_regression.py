"""data.task=regression: targets from table cell to batch, losses, evaluation, and the best checkpoint."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from ftexp.config.checks.recipe import fitted
from ftexp.config.checks.validate import validate
from ftexp.config.schema import REGRESSION, REGRESSION_LOSSES, AugmentConfig, DataConfig, LossConfig
from ftexp.data.feeds.feed import ToTensors
from ftexp.data.info import DataInfo
from ftexp.data.label_cells import as_labels
from ftexp.data.stratify import stratified_split
from ftexp.data.targets import in_units, label_column, label_rows, target_facts
from ftexp.errors import ConfigError, DataError
from ftexp.evaluation.metric_set import MetricSet
from ftexp.evaluation.numbers import NumberFindings
from ftexp.model.loss_registry import LossContext
from ftexp.model.losses import build_loss
from ftexp.worker.evaluation import evaluate
from tests.support.configs import composed
from tests.support.jobs import CPU, copied, make_job, same, train

INFO = DataInfo(
    ["light", "twice"], 8, 1, [0.5], [0.25], {}, task=REGRESSION, target_mean=[110.0, 110.0], target_std=[60.0, 60.0]
)
GENERATOR = torch.Generator().manual_seed(2)
OUTPUTS, TARGETS = torch.randn(9, 2, generator=GENERATOR), torch.randn(9, 2, generator=GENERATOR)


def config_of(**changes):
    return DataConfig(name="image_list", task=REGRESSION, **changes)


def where(split, item):
    return f"row {item} of {split}"


def test_cells_of_text_lists_json_and_columns_make_the_same_targets():
    expected = np.array([[1.5, -2.0], [0.25, 1000.0]], np.float32)
    for cells in (["1.5;-2", "0.25; 1e3"], [[1.5, -2], [0.25, 1000]], ["[1.5, -2]", "[0.25, 1000]"]):
        names, labels = as_labels({"train": cells}, config_of(), "labels", where)
        assert names == ["label_0", "label_1"]
        assert labels["train"].dtype == np.float32
        assert np.array_equal(labels["train"], expected)
    cells = {"train": [("1.5", "-2"), ("0.25", "1e3")]}
    names, labels = as_labels(cells, config_of(target_columns=["age", "height"]), "labels", where)
    assert names == ["age", "height"]
    assert np.array_equal(labels["train"], expected)
    assert as_labels({"train": ["3"], "val": [4.5]}, config_of(), "labels", where)[0] == ["label"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1", "two"], "labels holds 'two' at row 1 of train: data.task=regression takes finite numbers"),
        (["1", "nan"], "labels holds 'nan' at row 1 of train"),
        (["1", "1;2"], "labels holds 2 numbers at row 1 of train, and 1 in the first row: every sample needs as many"),
        (["", ""], "labels holds 0 numbers at row 0 of train"),
    ],
)
def test_a_cell_that_holds_no_targets_is_named(cells, message):
    with pytest.raises(DataError, match=message):
        as_labels({"train": cells}, config_of(), "labels", where)


def test_targets_are_standardised_by_train_alone_and_come_back_in_their_units():
    import pyarrow as pa

    labels = np.random.default_rng(0).normal(50, 7, (40, 3)).astype(np.float32)
    labels[:, 2] = 4  # a constant target
    facts = target_facts(config_of(), labels)
    np.testing.assert_allclose(facts["target_mean"], labels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(facts["target_std"][:2], labels.std(0)[:2], rtol=1e-5)
    assert facts["target_std"][2] == 1
    assert target_facts(config_of(standardize_targets=False), labels) == {}
    info = DataInfo(["a", "b", "c"], 4, 1, [0.0], [1.0], {}, task=REGRESSION, **facts)
    targets = ToTensors(info, CPU, channels_last=False).targets(labels)
    torch.testing.assert_close(targets.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    np.testing.assert_allclose(in_units(targets.numpy(), info.target_mean, info.target_std), labels, rtol=1e-6)
    assert np.array_equal(label_rows(pa.table({"label": label_column(labels)})["label"]), labels)
    rest, val = stratified_split(labels, (0.25,), seed=0)
    assert sorted([*rest, *val]) == list(range(40))
    assert len(val) == 10


@pytest.mark.parametrize("name", REGRESSION_LOSSES)
def test_a_loss_is_torchs_over_the_targets_of_each_sample(name):
    functions = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
    delta = {"delta": 0.3} if name == "huber" else {}
    loss = build_loss(LossContext(LossConfig(name=name, **delta), 2, 0.0, REGRESSION), list, CPU)
    losses = loss(OUTPUTS, TARGETS)
    assert losses.shape == (9,)
    torch.testing.assert_close(losses.mean(), functions[name](OUTPUTS, TARGETS, **delta))


def test_what_is_measured_is_scikit_learns_in_the_units_of_the_data():
    findings = NumberFindings()
    for part in (slice(0, 4), slice(4, 9)):
        findings.add(torch.empty(0), TARGETS[part], OUTPUTS[part])
    found = findings.report(INFO)
    predicted, true = (values.double().numpy() * 60 + 110 for values in (OUTPUTS, TARGETS))
    assert found["num_samples"] == 9
    for number, row in enumerate(found["targets"]):
        one, other = true[:, number], predicted[:, number]
        assert row["target"] == ["light", "twice"][number]
        assert row["mae"] == pytest.approx(mean_absolute_error(one, other), rel=1e-12)
        assert row["mse"] == pytest.approx(mean_squared_error(one, other), rel=1e-12)
        assert row["r2"] == pytest.approx(r2_score(one, other), rel=1e-12)
    assert found["r2"] == pytest.approx(r2_score(true, predicted), rel=1e-12)
    metrics = MetricSet(["mae", "mse", "r2"], REGRESSION, INFO.class_names, CPU, INFO.target_std)
    metrics.update(OUTPUTS[:4], TARGETS[:4])
    metrics.update(OUTPUTS[4:], TARGETS[4:])
    assert metrics.compute() == {name: pytest.approx(found[name], rel=1e-12) for name in ("mae", "mse", "r2")}


@pytest.mark.parametrize("mixes", [False, True])
def test_a_job_learns_numbers_and_has_the_same_bits_again(mixes):
    augment = AugmentConfig(mixup_alpha=0.4) if mixes else None
    jobs = [make_job(loss=LossConfig(name="mse"), info=INFO, augment=augment) for _ in range(2)]
    for job in jobs:
        evaluate(job, "val")
        before = job.progress.metrics["val_loss"]
        train(job)
        evaluate(job, "val")
        assert job.progress.metrics["val_loss"] < before / 2
        assert "val_accuracy" not in job.progress.metrics
    assert same(*map(copied, jobs))


NUMBERS = ["data=synthetic", "data.task=regression"]
WRONG = [
    (
        NUMBERS,
        "loss.name=ce with data.task=regression, whose labels are numbers: set loss=mse (mse, l1 and huber fit)",
    ),
    ([*NUMBERS, "loss=mse", "train.label_smoothing=0.1"], "train.label_smoothing=0.1 applies to classes, but data.ta"),
    ([*NUMBERS, "loss=mse", "loss.class_weights=inv_freq"], "loss.class_weights=inv_freq: data.task=regression has no"),
    (["loss.delta=2"], "loss.delta=2.0 needs loss.name=huber: remove it, or set that too"),
    (
        [*NUMBERS, "loss=mse"],
        "checkpoint.checkpoint_score_attribute=val_accuracy is not a logged metric. Metrics: train_",
    ),
    (
        [*NUMBERS, "loss=mse", "train.metrics=[top5]"],
        "train.metrics names top5, which is not a metric of data.task=regr",
    ),
    (["data=image_list", "data.root=x", "data.target_columns=[a]"], "data.target_columns=['a'] is for targets: set da"),
    (
        ["data=image_list", "data.root=x", "data.task=regression", "loss=mse", "data.num_classes=3"],
        "data.num_classes=3: data.task=regression takes the number of targets from the data; remove it",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(each[0]) for each in WRONG])
def test_what_does_not_fit_the_task_is_refused(overrides, message):
    with pytest.raises(ConfigError) as raised:
        validate(composed(*overrides))
    assert str(raised.value).startswith(message), raised.value


def test_checkpoints_are_ranked_by_loss_unless_something_was_typed():
    overrides = [*NUMBERS, "loss=huber", "loss.delta=2", "augment.mixup_alpha=0.2"]
    config, notes = fitted(composed(*overrides), overrides)
    validate(config)
    saving = config.checkpoint
    assert (saving.checkpoint_score_attribute, saving.checkpoint_score_order) == ("val_loss", "min")
    assert notes == ["checkpoint.checkpoint_score_attribute=val_loss instead of val_accuracy: data.task=regression"]
    typed = [*overrides, "checkpoint.checkpoint_score_attribute=val_accuracy"]
    config, notes = fitted(composed(*typed), typed)
    assert notes == []
    with pytest.raises(ConfigError, match="val_accuracy is not a logged metric"):
        validate(config)
