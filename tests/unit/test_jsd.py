"""loss=jsd and augment.splits: timm's loss per sample, and views that depend only on seed, position and view number."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.loss import JsdCrossEntropy

from ftexp.config.checks.validate import validate
from ftexp.config.schema import AugmentConfig, LossConfig
from ftexp.data.augment.erasing import Erasing
from ftexp.data.augment.picture import PictureAugment, view_positions
from ftexp.data.augment.pixels import Augment
from ftexp.data.cropping import Fit
from ftexp.data.feeds.decoding import Decode
from ftexp.data.feeds.feed import IndexedFeed, ToTensors
from ftexp.data.feeds.streamed import StreamedRows
from ftexp.data.info import DataInfo, IndexedSplit
from ftexp.data.order import SampleOrder
from ftexp.data.plan import ShardPlan
from ftexp.errors import ConfigError
from ftexp.model.loss_registry import LossContext
from ftexp.model.losses import build_loss
from tests.support.configs import composed
from tests.support.jobs import CPU, make_job, train

SIZE, VIEWS, SEED = 16, 3, 4
INFO = DataInfo(["a", "b"], SIZE, 3, [0.5] * 3, [0.25] * 3, {})
AUGMENT = AugmentConfig(crop="rrc", hflip=0.5, color_jitter=0.5, auto_augment="augmix-m3", splits=VIEWS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("views", [2, 3])
def test_the_mean_over_samples_is_what_timm_computes(views, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(7, views, 5, generator=generator), torch.arange(7) % 5
    context = LossContext(LossConfig(name="jsd", alpha=9.0), 5, smoothing, num_views=views)
    losses = build_loss(context, list, CPU)(logits.reshape(-1, 5).double(), labels)
    theirs = JsdCrossEntropy(views, alpha=9.0, smoothing=smoothing)
    by_view = logits.double().transpose(0, 1).reshape(-1, 5)  # timm's layout: all clean views first
    assert losses.shape == (7,)
    torch.testing.assert_close(losses.mean(), theirs(by_view, labels.repeat(views)), rtol=1e-9, atol=0)


def picture(sample):
    return np.random.default_rng(sample).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def test_the_first_view_is_cropped_and_flipped_and_the_others_are_changed_each_by_its_own_draws():
    fit = Fit(SIZE, 3)
    plain = dataclasses.replace(AUGMENT, color_jitter=None, auto_augment=None, splits=1)
    changed, clean = PictureAugment(AUGMENT, SEED, fit), PictureAugment(plain, SEED, fit)
    from PIL import Image

    for position in range(12):
        image = Image.fromarray(picture(position))
        views = [changed(image, int(view)) for view in view_positions(np.array([position]), VIEWS)]
        assert np.array_equal(views[0], clean(image, position))
        assert len({view.tobytes() for view in views}) == VIEWS
        assert np.array_equal(views[2], changed(image, position * VIEWS + 2))


class DecodedHere(StreamedRows):
    """Streamed rows whose pipelines are loops in this process."""

    def _start(self, span):
        decode = Decode(self._split, Fit(SIZE, 3), self._augment)
        return (decode({"sample": samples, "position": positions}) for samples, positions in span)


def never(*_):
    raise AssertionError("nothing is bad or slow here")


def read(items):
    for item in items.tolist():
        yield f"item {item}", lambda item=item: picture(item)


def views_of(world, accumulate, begin=0, total=40):
    """Check labels and weights over all ranks; return {position: its views}."""
    samples = np.arange(20)
    split = IndexedSplit(20, read, SimpleNamespace(get=lambda: (samples, samples % 2)), None)
    found, weight = {}, 0.0
    for rank in range(world):
        rows = DecodedHere(split, INFO, 1, never, never, PictureAugment(AUGMENT, SEED, Fit(SIZE, 3)))
        plan, to_tensors = ShardPlan(8, accumulate, total, rank, world), ToTensors(INFO, CPU, False)
        feed = IndexedFeed(rows, SampleOrder(0, 20), plan, to_tensors, Augment(AUGMENT, 0), VIEWS)
        for batch in feed.from_position(begin):
            for micro in batch.micro_batches:
                count = len(micro.positions)
                assert (len(micro.images), len(micro.labels), len(micro.weights)) == (VIEWS * count, count, count)
                weight += float(micro.weights.sum()) / world
                for row in np.flatnonzero(micro.weights.numpy() > 0):
                    views = micro.images[row * VIEWS : (row + 1) * VIEWS].clone()
                    found[int(micro.positions[row])] = (views, int(micro.labels[row]))
    return found, weight


def test_any_number_of_workers_and_any_beginning_give_the_same_views():
    alone, weight = views_of(1, 1)
    assert sorted(alone) == list(range(40))
    assert weight == pytest.approx(5)
    assert {label for _, label in alone.values()} == {0, 1}
    for world, accumulate, begin in ((3, 1, 0), (2, 2, 16)):
        other, _ = views_of(world, accumulate, begin)
        assert sorted(other) == list(range(begin, 40))
        for position, (views, label) in other.items():
            assert torch.equal(views, alone[position][0])
            assert label == alone[position][1]


def test_erasing_leaves_the_first_view_as_it_is():
    job = make_job(augment=AugmentConfig(erase_prob=1.0, splits=2), loss=LossConfig(name="jsd"))
    job.data.splits = 2
    micro = next(job.data.feed.from_position(0)).micro_batches[0]
    twice = dataclasses.replace(micro, images=micro.images.repeat_interleave(2, 0))
    before = twice.images.clone()
    images = job.data.augmented(twice, 0).images
    assert torch.equal(images[::2], before[::2])
    erasing = Erasing(AugmentConfig(erase_prob=1.0), 0, CPU)
    assert torch.equal(images[1::2], erasing(before[1::2].clone(), micro.positions * 2 + 1))


def test_a_job_learns_by_it():
    job = make_job(loss=LossConfig(name="jsd"), augment=AugmentConfig(splits=2))
    job.data.splits = 2
    job.data.feed._splits = 2
    train(job)
    _, right, count, _ = job.progress.train.totals()
    assert count == 3 * 96
    assert right / count > 0.6


def test_erasing_alone_makes_views_differ():
    validate(composed("loss=jsd", "augment.splits=2", "augment.erase_prob=0.5"))


WRONG = [
    (
        ["loss=jsd"],
        "loss.name=jsd compares views of each sample, but augment.splits=1: set, for example, augment.splits=3",
    ),
    (
        ["augment.splits=2", "augment.grayscale=0.5"],
        "augment.splits=2 makes views of each sample, but loss.name=ce does",
    ),
    (
        ["loss=jsd", "augment.splits=2"],
        "augment.splits=2: no augmentation makes the views differ; set, for",
    ),
    (
        ["loss=jsd", "augment.splits=2", "augment.grayscale=0.5", "augment.mixup_alpha=0.2"],
        "augment.mixup_alpha=0.2 with augment.splits=2: samples of several views aren't mixed, as in timm; set it to 0",
    ),
    (
        ["loss=jsd", "augment.splits=2", "augment.grayscale=0.5", "augment.brightness=0.2"],
        "augment.brightness=0.2 with augment.splits=2: it is the same for all views; set it to 0, and augment.color_ji",
    ),
    (["loss.alpha=3"], "loss.alpha=3.0 needs loss.name=jsd: remove it, or set that too"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(each[0]) for each in WRONG])
def test_what_cannot_be_meant_is_refused(overrides, message):
    with pytest.raises(ConfigError) as raised:
        validate(composed(*overrides))
    assert str(raised.value).startswith(message), raised.value


def test_timms_recipe_passes():
    validate(composed("loss=jsd", "augment.splits=3", "augment.auto_augment=augmix-m3", "augment.erase_prob=0.2"))
