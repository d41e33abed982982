"""The loss group: per-sample values as in timm and torch, and the same gradient for any number of workers."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import create_classification_loss

import ftexp.model.loss_registry
from ftexp.config.checks.validate import validate
from ftexp.config.schema import SINGLE_LABEL_LOSSES, LossConfig
from ftexp.data.plan import ShardPlan
from ftexp.errors import ConfigError, UnknownNameError
from ftexp.model.loss_registry import LossContext, check_name, check_num_weights
from ftexp.model.losses import build_loss, class_weights
from ftexp.plugins import register_loss
from ftexp.registry import Registry
from ftexp.worker.evaluation import evaluate
from tests.support.configs import composed
from tests.support.jobs import CPU, make_job, train

CLASSES, COUNTS = 5, [40, 1, 9, 0, 30]
GENERATOR = torch.Generator().manual_seed(3)
LOGITS = 3 * torch.randn(11, CLASSES, generator=GENERATOR)
LABELS = torch.randint(0, CLASSES, (11,), generator=GENERATOR)
MIXED = torch.rand(11, CLASSES, generator=GENERATOR).softmax(1)
TIMMS = {  # {loss: (settings, timm's arguments for the same)}
    "ce": ({}, {}),
    "bce": ({"target_threshold": 0.2}, {"bce_target_thresh": 0.2}),
    "asl": ({"gamma_pos": 1.5, "gamma_neg": 3.0}, {"asl_gamma_pos": 1.5, "asl_gamma_neg": 3.0}),
    "poly": ({"epsilon": -1.0}, {"poly_epsilon": -1.0}),
}
PAIRS = [
    *itertools.product(SINGLE_LABEL_LOSSES, [False]),
    *itertools.product(["ce", "bce", "poly"], [True]),
]  # (name, mixed)


def loss_of(name="ce", smoothing=0.0, counts=COUNTS, **settings):
    return build_loss(LossContext(LossConfig(name=name, **settings), len(counts), smoothing), lambda: counts, CPU)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("name", "mixed"), [each for each in PAIRS if each[0] in TIMMS])
def test_the_mean_over_samples_is_what_timm_computes(name, smoothing, mixed):
    (settings, arguments), targets = TIMMS[name], MIXED if mixed else LABELS
    losses = loss_of(name, smoothing, **settings)(LOGITS.double(), targets.double() if mixed else targets)
    theirs = create_classification_loss(name, smoothing=smoothing, soft_targets=mixed, **arguments)
    expected = theirs(LOGITS.double(), targets.double() if mixed else targets)
    assert losses.shape == (11,)
    torch.testing.assert_close(losses.mean(), expected.to(losses.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("targets", [LABELS, MIXED], ids=["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_has_the_bits_of_runs_that_began_before_there_were_others(smoothing, targets):
    expected = F.cross_entropy(
        LOGITS, targets, reduction="none", label_smoothing=smoothing if targets is LABELS else 0.0
    )
    assert torch.equal(loss_of(smoothing=smoothing)(LOGITS, targets), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_focal_weighs_the_term_of_the_right_class_by_how_wrong_a_sample_is(gamma, smoothing):
    target = F.one_hot(LABELS, CLASSES).double()
    p = LOGITS.double().softmax(1)
    terms = (target * (1 - smoothing) + smoothing / CLASSES) * p.log() * (1 - target * p) ** (gamma * target)
    losses = loss_of("focal", smoothing, gamma=gamma)(LOGITS.double(), LABELS)
    torch.testing.assert_close(losses, -terms.sum(1), rtol=1e-12, atol=0)


def test_binary_cross_entropy_takes_the_sum_of_classes_and_weighs_positives():
    target = F.one_hot(LABELS, CLASSES).double()
    weights = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = F.binary_cross_entropy_with_logits(
        LOGITS.double(), target, pos_weight=torch.tensor(weights).double(), reduction="none"
    ).sum(1)
    losses = loss_of("bce", sum_classes=True, pos_weight=weights)(LOGITS.double(), LABELS)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", SINGLE_LABEL_LOSSES)
def test_a_sample_that_is_surely_right_or_wrong_has_a_finite_gradient(name):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    losses = loss_of(name, counts=[1, 1])(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logits.grad).all()


def test_each_class_weighs_the_same_in_all_by_its_inverse_frequency():
    weights = class_weights(LossConfig(class_weights="inv_freq"), lambda: [40, 10, 50])
    torch.testing.assert_close(weights * torch.tensor([40.0, 10, 50]), torch.full((3,), 100 / 3))


def test_effective_numbers_are_those_of_the_paper_and_lie_between():
    counts, beta = [40, 10, 50], 0.9
    weights = class_weights(LossConfig(class_weights="effective_num", effective_num_beta=beta), lambda: counts)
    expected = torch.tensor([(1 - beta) / (1 - beta**count) for count in counts])
    torch.testing.assert_close(weights / weights[0], expected / expected[0])
    assert 1 < (weights[1] / weights[2]) < 5


@pytest.mark.parametrize("method", ["inv_freq", "effective_num"])
def test_counted_weights_leave_the_mean_over_samples_at_1_and_a_missing_class_finite(method):
    weights = class_weights(LossConfig(class_weights=method), lambda: COUNTS)
    assert torch.dot(weights, torch.tensor(COUNTS, dtype=torch.float32)).item() == pytest.approx(sum(COUNTS))
    assert weights[3] == weights[1]


def test_a_list_of_weights_is_taken_as_it_is():
    given = [0.0, 2.0, 1.0, 1.0, 0.5]
    losses = loss_of(class_weights=given)(LOGITS, LABELS)
    assert torch.equal(losses, F.cross_entropy(LOGITS, LABELS, reduction="none") * torch.tensor(given)[LABELS])


def test_a_mixed_sample_has_the_weights_of_its_classes_by_their_parts():
    given = [0.0, 2.0, 1.0, 1.0, 0.5]
    losses = loss_of("poly", class_weights=given)(LOGITS, MIXED)
    expected = loss_of("poly")(LOGITS, MIXED) * (MIXED * torch.tensor(given)).sum(1)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(("name", "mixed"), PAIRS)
def test_the_gradient_is_the_global_mean_for_any_number_of_workers_and_micro_batches(name, mixed):
    loss = loss_of(name, class_weights=[0.5, 2.0, 1.0, 3.0, 1.0])
    images = torch.randn(23, 7, generator=torch.Generator().manual_seed(1)).double()
    targets = torch.from_numpy(np.arange(23) % CLASSES)
    targets = (
        F.one_hot(targets, CLASSES).double().lerp(torch.full((23, CLASSES), 0.2).double(), 0.3) if mixed else targets
    )
    head = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(2)).double().requires_grad_()

    def gradient(accumulate, world):
        total = torch.zeros_like(head)
        for rank in range(world):
            for share in ShardPlan(23, accumulate, 23, rank, world).micro_shares(0, 23):
                rows = torch.from_numpy(share.positions)
                weights = (torch.arange(len(rows)) < share.num_counted).double() * (world / 23)
                losses = loss(images[rows] @ head, targets[rows])
                total += torch.autograd.grad((losses * weights).sum(), head)[0] / world  # as DDP averages
        return total

    (alone,) = torch.autograd.grad(loss(images @ head, targets).mean(), head)
    for accumulate, world in ((3, 1), (1, 2), (2, 5)):
        rtol = 1e-4 if name == "poly" else 1e-12  # timm's poly computes in float32
        torch.testing.assert_close(gradient(accumulate, world), alone, rtol=rtol, atol=rtol / 1000)


@pytest.mark.parametrize("name", SINGLE_LABEL_LOSSES)
def test_a_job_trains_by_the_loss_and_is_evaluated_by_cross_entropy(name):
    jobs = {each: make_job(loss=LossConfig(name=each)) for each in ("ce", name)}
    before = {}
    for each, job in jobs.items():
        evaluate(job, "val")
        before[each] = job.progress.metrics["val_loss"]
    assert before[name] == before["ce"]
    train(jobs[name])
    evaluate(jobs[name], "val")
    assert jobs[name].progress.metrics["val_loss"] < before[name]
    assert jobs[name].progress.metrics["val_accuracy"] > 0.9


def test_a_loss_of_your_own_is_trained_by(monkeypatch):
    monkeypatch.setattr(ftexp.model.loss_registry, "_losses", Registry("loss.name"))
    seen = []

    @register_loss("hinge")
    def hinge(context):
        seen.append((context.num_classes, context.config.kwargs))
        return lambda logits, targets: F.multi_margin_loss(logits, targets, reduction="none")

    monkeypatch.setattr(ftexp.model.losses, "loss_builder", lambda name: {"hinge": hinge}[name])
    job = make_job(loss=LossConfig(name="hinge", kwargs={"margin": 1}))
    train(job)
    evaluate(job, "val")
    assert seen == [(2, {"margin": 1})]
    assert job.progress.metrics["val_accuracy"] > 0.9


def test_a_name_that_nothing_registered_is_refused_with_what_there_is():
    with pytest.raises(
        UnknownNameError, match=r"^loss\.name='focall' is unknown\. Did you mean 'focal'\? Available: asl, b"
    ):
        check_name("focall")


def test_weights_that_do_not_fit_the_classes_of_the_data_are_refused():
    check_num_weights(LossConfig(class_weights=[1.0, 2.0]), 2)
    with pytest.raises(
        ConfigError, match=r"^loss\.pos_weight=\[1\.0\] has 1 weights, and the data have 2 classes: give o"
    ):
        check_num_weights(LossConfig(name="bce", pos_weight=[1.0]), 2)


WRONG = [
    (
        ["loss.name=focall"],
        "loss.name='focall' is unknown. Did you mean 'focal'? Available: ce, bce, focal, asl, poly",
    ),
    (["loss.gamma=3"], "loss.gamma=3.0 needs loss.name=focal: remove it, or set that too"),
    (["loss=focal", "loss.gamma=0.5"], "loss.gamma=0.5 must be 0 or at least 1: else gradients are infinite at p"),
    (
        ["loss=focal", "augment.mixup_alpha=0.2"],
        "loss.name=focal takes one class per sample, but samples are mixed: set ",
    ),
    (["loss=bce", "loss.target_threshold=0.2"], "loss.target_threshold=0.2 needs augment.mixup_alpha or augment.cutmi"),
    (
        ["loss.class_weights=inverse"],
        "loss.class_weights=inverse must be none, inv_freq, effective_num, or a list with o",
    ),
    (
        ["loss.class_weights=[1,-1]"],
        "loss.class_weights=[1, -1] must be none, inv_freq, effective_num, or a list with o",
    ),
    (["loss.class_weights=[0,0]"], "loss.class_weights=[0, 0] must be none, inv_freq, effective_num, or a list with o"),
    (
        ["loss.effective_num_beta=0.9"],
        "loss.effective_num_beta=0.9 needs loss.class_weights=effective_num: remove it",
    ),
    (
        ["loss=bce", "loss.pos_weight=-1"],
        "loss.pos_weight=[-1] must be a list with one weight per class, none below 0",
    ),
    (
        ["data.num_classes=10", "loss.class_weights=[1,2]"],
        "loss.class_weights=[1, 2] has 2 weights, but data.num_class",
    ),
    (["+loss.kwargs.margin=2"], "loss.kwargs={'margin': 2} needs a loss from a plug-in: remove it, or set that too"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(each[0]) for each in WRONG])
def test_what_cannot_be_meant_is_refused(overrides, message):
    with pytest.raises(ConfigError) as raised:
        validate(composed(*overrides))
    assert str(raised.value).startswith(message), raised.value


def test_a_weight_that_is_no_number_is_refused():
    assert math.isnan(composed("loss.class_weights=[nan,1]").loss.class_weights[0])
    with pytest.raises(ConfigError, match="must be none"):
        validate(composed("loss.class_weights=[nan,1]"))
