"""data.task=multi_label: label sets from table cell to batch, timm's losses and mixing on them, and evaluation."""

import base64
import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.loss import compute_class_weights, create_classification_loss
from torchvision.ops import sigmoid_focal_loss

from ftexp.config.checks.validate import validate
from ftexp.config.schema import MULTI_LABEL, MULTI_LABEL_LOSSES, AugmentConfig, DataConfig, LossConfig
from ftexp.data.augment.mixing import Mixing
from ftexp.data.batches import MicroBatch
from ftexp.data.feeds.feed import ToTensors
from ftexp.data.info import DataInfo
from ftexp.data.label_cells import as_labels
from ftexp.data.labels import class_warnings
from ftexp.data.plan import ShardPlan
from ftexp.data.stratify import stratified_split
from ftexp.data.targets import class_counts, distinct, label_column, label_rows, packed, unpacked
from ftexp.errors import ConfigError, DataError
from ftexp.evaluation.counting import count_into
from ftexp.evaluation.findings import findings_of
from ftexp.evaluation.label_sets import average_precision, thresholds_of
from ftexp.evaluation.meter import Meter, means
from ftexp.evaluation.metric_set import MetricSet
from ftexp.model.loss_registry import LossContext
from ftexp.model.losses import build_loss
from ftexp.predict.answers import answered, answers_of
from ftexp.predict.parts import part_table
from ftexp.worker.evaluation import evaluate
from tests.support.configs import composed
from tests.support.feeds import mixing_seed
from tests.support.jobs import CPU, copied, make_job, same, train

CLASSES = 11  # more than the bits of a byte
GENERATOR = torch.Generator().manual_seed(5)
LOGITS = 3 * torch.randn(13, CLASSES, generator=GENERATOR)
SETS = (torch.rand(13, CLASSES, generator=GENERATOR) < 0.3).float()
SETS[4] = 0  # a sample without a label
SOFT = SETS.lerp(SETS.flip(0), 0.3)
COUNTS = [40, 1, 9, 0, 30, 5, 6, 7, 8, 9, 10]
INFO = DataInfo(["dark", "light", "picture"], 8, 1, [0.5], [0.25], {}, task=MULTI_LABEL)
TIMMS = {  # {loss: (settings, timm's arguments for the same)}
    "bce": ({"pos_weight": 3.0}, {"pos_weight": 3.0}),
    "asl": (
        {"gamma_pos": 1.5, "gamma_neg": 3.0, "clip": 0.1, "pos_weight": 2.0},
        {"asl_gamma_pos": 1.5, "asl_gamma_neg": 3.0, "asl_clip": 0.1, "pos_weight": 2.0},
    ),
}


def packed_rows(rows):
    dense = np.asarray(rows, bool)
    return packed(*np.nonzero(dense), *dense.shape)


def loss_of(name, smoothing=0.0, **settings):
    context = LossContext(LossConfig(name=name, **settings), CLASSES, smoothing, MULTI_LABEL)
    return build_loss(context, lambda: COUNTS, CPU)


@given(st.integers(0, 20), st.integers(1, 40), st.randoms(use_true_random=False))
def test_sets_of_classes_are_kept_bit_by_bit(num_samples, num_classes, draws):
    dense = np.array([[draws.random() < 0.3 for _ in range(num_classes)] for _ in range(num_samples)], bool)
    bits = packed_rows(dense.reshape(num_samples, num_classes))
    assert bits.shape == (num_samples, -(-num_classes // 8))
    assert np.array_equal(unpacked(bits, num_classes), dense.reshape(num_samples, num_classes))
    assert class_counts(bits, num_classes).tolist() == dense.reshape(num_samples, num_classes).sum(0).tolist()


def test_sets_of_classes_go_through_a_table_and_become_a_batch():
    import pyarrow as pa

    bits = packed_rows(SETS.numpy())
    column = pa.table({"label": label_column(bits)})["label"]
    assert np.array_equal(label_rows(column), bits)
    numbers = np.arange(3)
    assert label_rows(pa.table({"label": label_column(numbers)})["label"]).tolist() == [0, 1, 2]
    info = DataInfo([str(number) for number in range(CLASSES)], 4, 1, [0.0], [1.0], {}, task=MULTI_LABEL)
    targets = ToTensors(info, CPU, channels_last=False).targets(bits)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, SETS)


def config_of(**changes):
    return DataConfig(name="image_list", task=MULTI_LABEL, **changes)


def where(split, item):
    return f"row {item} of {split}"


def test_cells_of_text_lists_and_json_make_the_same_sets():
    text = {"train": ["cat; dog", "", "dog;", None], "val": ["owl"]}
    lists = {"train": [["dog", "cat"], [], ["dog"], None], "val": [["owl"]]}
    json_text = {"train": ['["cat", "dog"]', "[]", '["dog"]', ""], "val": ['["owl"]']}
    for cells, is_text in ((text, True), (lists, False), (json_text, True)):
        names, labels = as_labels(cells, config_of(), "labels", where, is_text)
        assert names == ["cat", "dog", "owl"]
        assert unpacked(labels["train"], 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]]
        assert unpacked(labels["val"], 3).tolist() == [[0, 0, 1]]
    names, labels = as_labels({"train": ["2|10"]}, config_of(label_separator="|"), "labels", where)
    assert names == ["2", "10"]  # in numerical order
    assert labels["train"].shape == (1, 1)
    names, labels = as_labels({"train": ["2"]}, config_of(num_classes=9), "labels", where)
    assert labels["train"].shape == (1, 2)  # with room for classes without samples
    assert unpacked(labels["train"], 9).tolist() == [[0, 0, 1, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([["a"], ["b", None]], "labels holds no label at row 1 of train: labels are all text, or all whole numbers"),
        (["a", '["b"'], r"labels holds '\[\"b\"' at row 1 of train, which is not a JSON list"),
        (["", None], "labels holds no label at all"),
    ],
)
def test_a_cell_that_is_no_set_of_classes_is_named(cells, message):
    with pytest.raises(DataError, match=message):
        as_labels({"train": cells}, config_of(), "labels", where)


def test_splits_are_divided_alike_by_the_rarest_class_of_each_sample():
    rows = np.zeros((200, 3), bool)
    rows[:, 0] = True
    rows[:100, 1] = True
    rows[:20, 2] = True
    rows[190:] = False  # without a label
    rest, val = stratified_split(packed_rows(rows), (0.1,), seed=0)
    assert sorted([*rest, *val]) == list(range(200))
    assert [int((val < stop).sum()) for stop in (20, 100, 190, 200)] == [2, 10, 19, 20]


def test_labels_as_text_are_told_once_each():
    names, numbers = distinct(packed_rows([[1, 0, 1], [0, 0, 0], [1, 0, 1]]), ["a", "b", "c"], ";")
    assert [names[number] for number in numbers] == ["a;c", "", "a;c"]


def test_classes_that_train_lacks_are_told_by_labels():
    sets = {"train": packed_rows([[1, 0]]), "val": packed_rows([[1, 1], [0, 1]])}
    assert class_warnings(["a", "b"], sets) == [
        "2 of the 3 labels of val have a class without a training sample, so each counts as wrong: 'b' (2)"
    ]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", TIMMS)
def test_the_mean_over_samples_is_what_timm_computes(name, smoothing):
    settings, arguments = TIMMS[name]
    weights = torch.rand(CLASSES, generator=torch.Generator().manual_seed(1))
    losses = loss_of(name, smoothing, class_weights=weights.tolist(), **settings)(LOGITS, SETS)
    theirs = create_classification_loss(name, True, smoothing, class_weight=weights, **arguments)(LOGITS, SETS)
    assert losses.shape == (13,)
    torch.testing.assert_close(losses.mean(), theirs, rtol=1e-6, atol=0)


def test_binary_cross_entropy_is_torchs_and_may_be_summed():
    expected = F.binary_cross_entropy_with_logits(LOGITS.double(), SETS.double(), reduction="none")
    torch.testing.assert_close(loss_of("bce")(LOGITS.double(), SETS.double()), expected.mean(1), rtol=1e-12, atol=0)
    summed = loss_of("bce", sum_classes=True)(LOGITS.double(), SETS.double())
    torch.testing.assert_close(summed, expected.sum(1), rtol=1e-12, atol=0)


def test_focal_is_torchvisions_without_alpha_and_at_0_binary_cross_entropy():
    expected = sigmoid_focal_loss(LOGITS, SETS, alpha=-1, gamma=2.5, reduction="none").mean(1)
    assert torch.equal(loss_of("focal", gamma=2.5)(LOGITS, SETS), expected)
    for smoothing in (0.0, 0.2):
        same_smoothing = loss_of("focal", smoothing, gamma=0.0)(LOGITS, SETS)
        torch.testing.assert_close(same_smoothing, loss_of("bce", smoothing)(LOGITS, SETS))


@pytest.mark.parametrize("method", ["inv_freq", "effective_num"])
def test_counted_weights_are_timms_of_each_class(method):
    _, weights = compute_class_weights(COUNTS, 200, method)
    assert weights.mean().item() == pytest.approx(1)
    expected = (F.binary_cross_entropy_with_logits(LOGITS, SETS, reduction="none") * weights).mean(1)
    torch.testing.assert_close(loss_of("bce", class_weights=method)(LOGITS, SETS), expected)


@pytest.mark.parametrize("name", MULTI_LABEL_LOSSES)
def test_a_sample_that_is_surely_right_or_wrong_has_a_finite_gradient(name):
    logits = torch.full((2, CLASSES), 200.0) * (2 * SETS[:1] - 1) * torch.tensor([[1.0], [-1.0]])
    logits.requires_grad_()
    loss_of(name)(logits, SETS[:1].repeat(2, 1)).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_sets_are_mixed_as_timm_mixes_them(mode):
    config = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mix_mode=mode)
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    share = ShardPlan(2, 1, 26, 0, 1, True).micro_shares(24, 26)[0]
    batch = MicroBatch(images.clone(), SETS[:2], torch.full((2,), 0.5), share.positions, share.pairs(24, None))
    mixed = Mixing(config, CLASSES, 0.1, 3, has_vectors=True)(batch, 24)
    np.random.seed(mixing_seed(3, 24))
    theirs = timm.data.mixup.Mixup(0.8, 1.0, mode=mode, label_smoothing=0.1, num_classes=CLASSES, multi_label=True)
    expected, targets = theirs(images.clone(), SETS[:2].clone())
    assert torch.equal(mixed.images, expected)
    assert torch.equal(mixed.targets, targets)
    off = Mixing(config, CLASSES, 0.1, 3, end=0, has_vectors=True)(copy.copy(batch), 24)
    torch.testing.assert_close(off.targets, SETS[:2] * 0.9 + 0.05)


@pytest.mark.parametrize("name", MULTI_LABEL_LOSSES)
def test_a_job_learns_sets_and_micro_batches_change_nothing(name):
    jobs = [make_job(loss=LossConfig(name=name), info=INFO, accumulate_steps=number) for number in (1, 3)]
    for job in jobs:
        train(job)
        evaluate(job, "val")
    metrics = jobs[0].progress.metrics
    assert metrics["val_accuracy"] > (0.6 if name == "asl" else 0.9)  # in so few steps, asl mostly learns positives
    assert jobs[1].progress.metrics["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-4)


def test_the_same_job_has_the_same_bits_again_with_mixed_samples():
    augment = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    jobs = [make_job(loss=LossConfig(name="bce"), augment=augment, info=INFO, label_smoothing=0.1) for _ in range(2)]
    for job in jobs:
        train(job)
    assert same(*map(copied, jobs))


def test_evaluation_is_the_mean_binary_cross_entropy_and_the_share_of_exact_sets():
    meter, model = Meter(CPU), torch.nn.Identity()
    batches = [(LOGITS[:5], SETS[:5]), (LOGITS[5:], SETS[5:])]
    count_into([(model, meter)], lambda found: found, batches, torch.autocast("cpu", enabled=False), task=MULTI_LABEL)
    loss, accuracy = means(meter.totals())
    expected = F.binary_cross_entropy_with_logits(LOGITS.double(), SETS.double())
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert accuracy == 0  # no sample has all of its 11 random decisions right
    meter.reset()
    nearly = (2 * SETS - 1) * torch.rand(SETS.shape, generator=GENERATOR)
    nearly[2, 3] *= -1
    count_into(
        [(model, meter)], lambda found: found, [(nearly, SETS)], torch.autocast("cpu", enabled=False), task=MULTI_LABEL
    )
    assert means(meter.totals())[1] == 12 / 13


MULTI = ["data=synthetic", "data.task=multi_label"]
WRONG = [
    (MULTI, "loss.name=ce with data.task=multi_label, whose labels are any number of classes for each sample: set los"),
    ([*MULTI, "loss=poly"], "loss.name=poly with data.task=multi_label, whose labels are any number of classes for ea"),
    (["loss=mse"], "loss.name=mse with data.task=single_label, whose labels are one class for each sample: set loss="),
    (["data.task=multi_label", "loss=bce"], "data.task=multi_label: the samples of data.name=digits have one class ea"),
    ([*MULTI, "loss=bce", "data.sampling=sqrt"], "data.sampling=sqrt draws by class, but labels of data.task=multi_la"),
    (["loss=asl", "loss.clip=0.1"], "loss.clip=0.1 needs loss.name=asl and data.task=multi_label: remove it, or set t"),
    (["loss=asl", "loss.pos_weight=2"], "loss.pos_weight=2 needs loss.name=bce: remove it, or set that too"),
    (
        ["data=image_list", "data.root=x", "data.label_separator=','"],
        "data.label_separator=',' is for cells of several ",
    ),
    (["data=synthetic", "data.label_separator=','"], "data.label_separator=, is not used by data.name=synthetic"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(each[0]) for each in WRONG])
def test_what_does_not_fit_the_task_is_refused(overrides, message):
    with pytest.raises(ConfigError) as raised:
        validate(composed(*overrides))
    assert str(raised.value).startswith(message), raised.value


def test_what_fits_the_task_passes():
    for loss in (["loss=bce", "loss.pos_weight=2"], ["loss=asl", "loss.pos_weight=2", "augment.mixup_alpha=0.2"]):
        validate(composed(*MULTI, *loss, "loss.class_weights=inv_freq"))


def test_average_precision_is_scikit_learns_also_where_probabilities_are_equal():
    from sklearn.metrics import average_precision_score

    draws = np.random.default_rng(0)
    for digits in (1, 7):
        probabilities = draws.random(200).round(digits).astype(np.float32)
        held = draws.random(200) < probabilities * 0.5
        assert average_precision(probabilities, held) == pytest.approx(average_precision_score(held, probabilities))
    assert average_precision(probabilities, np.zeros(200, bool)) is None
    assert average_precision(np.full(2, np.nan, np.float32), np.array([True, False])) is None


def test_what_is_found_of_each_class_is_scikit_learns_at_its_threshold():
    from sklearn.metrics import average_precision_score, precision_score, recall_score

    names, thresholds = [f"c{number}" for number in range(CLASSES)], np.linspace(0.2, 0.8, CLASSES).tolist()
    info = DataInfo(names, 8, 1, [0.5], [0.25], {}, task=MULTI_LABEL)
    findings = findings_of(info, lambda images: np.zeros((len(images), 8, 8, 1), np.uint8), thresholds)
    for part in (slice(0, 6), slice(6, 13)):
        findings.add(torch.zeros(13, 1, 8, 8)[part], SETS[part], LOGITS[part])
    found, held, probabilities = findings.report(info), SETS.numpy(), LOGITS.sigmoid().numpy()
    assert found["num_samples"] == 13
    assert found["labels_per_sample"] == pytest.approx(SETS.sum().item() / 13)
    told = probabilities > np.array(thresholds, np.float32)
    averages = []
    for number, row in enumerate(found["classes"]):
        assert row["class"] == names[number]
        assert row["num_samples"] == held[:, number].sum()
        assert row["threshold"] == pytest.approx(thresholds[number], abs=1e-6)
        if held[:, number].any():
            assert row["recall"] == recall_score(held[:, number], told[:, number])
            averages.append(average_precision_score(held[:, number], probabilities[:, number]))
            assert row["average_precision"] == pytest.approx(averages[-1])
        if told[:, number].any():
            assert row["precision"] == precision_score(held[:, number], told[:, number])
    assert found["average_precision"] == pytest.approx(np.mean(averages))


def test_the_most_confident_mistakes_come_with_their_sets_and_pictures():
    info = DataInfo(["a", "b", "c"], 8, 1, [0.5], [0.25], {}, task=MULTI_LABEL)
    findings = findings_of(info, lambda images: np.full((len(images), 8, 8, 1), images.mean() * 255, np.uint8), 0.5)
    held = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1]]).float()
    # rows: correct; b is a false positive; c is missed and, with more confidence, a is given; a is narrowly missed
    logits = torch.tensor([[9.0, -9, -9], [-9, 2, -9], [4, 4, -3], [-0.5, 9, 9]])
    for row in range(4):
        findings.add(torch.full((1, 1, 8, 8), row / 4), held[row : row + 1], logits[row : row + 1])
    mistakes = findings.report(info)["mistakes"]
    assert [(mistake["label"], mistake["prediction"]) for mistake in mistakes] == [
        ("b, c", "a, b"),
        ("no class", "b"),
        ("a, b, c", "b, c"),
    ]
    expected = torch.tensor([4.0, 2.0, 0.5]).sigmoid().tolist()
    assert [mistake["confidence"] for mistake in mistakes] == pytest.approx(expected)
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(mistake["png"])))) for mistake in mistakes]
    assert [picture[0, 0] for picture in pictures] == [127, 63, 191]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.1, 0.2], "threshold=.* has 2 thresholds for 3 classes"),
        (1.5, "1.5 is not a probability"),
        ("a", "'a' is not a p"),
    ],
)
def test_a_threshold_that_cannot_be_meant_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        findings_of(INFO, lambda _: None, given)
    assert thresholds_of("threshold", None, 2) == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_predictions_are_the_classes_above_their_threshold_sure_ones_first(kind):
    plan = SimpleNamespace(format=kind, thresholds=[0.5, 0.5, 0.9])
    logits = torch.tensor([[0.1, 2.0, 2.0], [-1.0, -1.0, -1.0], [5.0, 5.0, 5.0]])
    classes, probabilities = answered(logits, INFO, 3)
    batch = {
        "where": np.array(["a", "b", "c"]),
        "error": np.array(["", "", "torn"]),
        "label": np.array([0, -1, -1]),
        "classes": classes.numpy(),
        "probabilities": probabilities.numpy(),
    }
    table = part_table(batch, INFO.class_names, ["light;dark"], answers_of(plan, MULTI_LABEL)).to_pydict()
    sure = [torch.tensor(value).sigmoid().item() for value in (2.0, 0.1)]
    if kind == "csv":
        assert table["labels"] == ["light;dark", "", None]
        assert table["probabilities"] == [";".join(f"{value:.6g}" for value in sure), "", None]
    else:
        assert table["labels"] == [["light", "dark"], [], None]
        assert table["probabilities"][:2] == [pytest.approx(sure), []]
    assert list(table) == ["path", "labels", "probabilities", "truth", "error"]
    assert table["truth"] == ["light;dark", None, None]
    assert table["error"] == [None, None, "torn"]


def test_metrics_of_sets_are_scikit_learns():
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics = MetricSet(["average_precision", "auroc"], MULTI_LABEL, [str(n) for n in range(CLASSES)], CPU)
    for part in (slice(0, 6), slice(6, 13)):
        metrics.update(LOGITS[part], SETS[part])
    found, held, probabilities = metrics.compute(), SETS.numpy(), LOGITS.sigmoid().numpy()
    both = [number for number in range(CLASSES) if 0 < held[:, number].sum() < 13]
    for name, score in (("average_precision", average_precision_score), ("auroc", roc_auc_score)):
        expected = np.mean([score(held[:, number], probabilities[:, number]) for number in both])
        assert found[name] == pytest.approx(expected, rel=1e-6)
