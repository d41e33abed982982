"""Mixup, cutmix, random erasing, RandAugment: the same results as timm's, for any number of workers."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import timm.loss
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from ftexp.config.schema import ERASE_MODES, MIX_MODES, AugmentConfig
from ftexp.data.augment.erasing import Erasing
from ftexp.data.augment.mixing import Mixing
from ftexp.data.augment.pixels import Augment
from ftexp.data.batches import MicroBatch
from ftexp.data.feeds.feed import CachedRows, IndexedFeed, ToTensors
from ftexp.data.info import DataInfo
from ftexp.data.order import SampleOrder, derive_seed
from ftexp.data.plan import ShardPlan, cut_off
from ftexp.inspecting.inspect import as_the_model_sees
from tests.support.feeds import Unreadable, make_feed, mixing_seed

CPU = torch.device("cpu")
CLASSES = 5
BOTH = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(12, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(0, CLASSES, (12,), generator=GENERATOR)


def configured(mode, **changes):
    return AugmentConfig(**{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_mode": mode, **changes})


def whole_batch(count=12, start=0):
    """Return a micro-batch that is a whole global batch."""
    share = ShardPlan(count, 1, start + count, 0, 1, True).micro_shares(start, start + count)[0]
    rows = share.positions - start
    return MicroBatch(
        IMAGES[rows].clone(),
        LABELS[rows],
        torch.full((len(rows),), 1 / count),
        share.positions,
        share.pairs(start, None),
    )


def timms(config, smoothing=0.1, **changes):
    return timm.data.mixup.Mixup(
        config.mixup_alpha, config.cutmix_alpha, None, config.mix_prob, config.mix_switch_prob, config.mix_mode,
        label_smoothing=smoothing, num_classes=CLASSES, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("changes", [{}, {"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}, {"mix_prob": 0.5}], ids=str)
def test_a_global_batch_is_mixed_as_timm_mixes_it(seed, changes):
    config = configured("batch", **changes)
    mixed = Mixing(config, CLASSES, 0.1, seed)(whole_batch(start=24), 24)
    # timm mixes the first sample with the last; ftexp mixes neighbours
    order = [0, 2, 4, 6, 8, 10, 11, 9, 7, 5, 3, 1]
    np.random.seed(mixing_seed(seed, 24))
    images, targets = timms(config)(IMAGES[order].clone(), LABELS[order])
    assert torch.equal(mixed.images[order], images)
    assert torch.equal(mixed.targets[order], targets)
    assert torch.equal(mixed.labels, LABELS)


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_two_samples_that_draw_for_themselves_are_mixed_as_timm_mixes_two(mode):
    config = configured(mode, mix_prob=0.8)
    mixed = Mixing(config, CLASSES, 0.1, 3)(whole_batch(start=24), 24)
    for first in range(0, 12, 2):
        np.random.seed(mixing_seed(3, 24 + first))
        images, targets = timms(config)(IMAGES[first : first + 2].clone(), LABELS[first : first + 2])
        assert torch.equal(mixed.images[first : first + 2], images)
        assert torch.equal(mixed.targets[first : first + 2], targets)
    assert len({tuple(row.tolist()) for row in mixed.targets}) > 4


@given(
    batch=st.integers(2, 13),
    total=st.integers(1, 30),
    accumulate=st.integers(1, 4),
    world=st.integers(1, 5),
    mode=st.sampled_from(MIX_MODES),
)
def test_a_sample_is_mixed_alike_by_any_number_of_workers_and_micro_batches(batch, total, accumulate, world, mode):
    augment = configured(mode)
    mixing = Mixing(augment, 101, 0.1, 1)  # make_feed's labels are multiples of ten

    def mixed(accumulate, world):
        found = {}
        for rank in range(world):
            feed = make_feed(
                11, ShardPlan(batch, accumulate, total, rank, world, True), augment=AugmentConfig(pad_px=1)
            )
            for share in feed.from_position(0):
                for micro in share.micro_batches:
                    done = mixing(micro, share.start)
                    assert len(done.images) == len(done.labels) == len(done.targets) == len(done.weights)
                    for row in torch.nonzero(done.weights).flatten().tolist():
                        found[int(done.positions[row])] = (done.images[row], done.targets[row])
        return found

    alone, shared = mixed(1, 1), mixed(accumulate, world)
    assert alone.keys() == shared.keys() == set(range(total))
    for position, (image, target) in alone.items():
        assert torch.equal(shared[position][0], image)
        assert torch.equal(shared[position][1], target)


@given(st.integers(0, 20), st.integers(1, 15), st.data())
def test_no_more_than_two_partners_are_taken_along_and_each_sample_has_its_own(start, size, data):
    low = data.draw(st.integers(start, start + size))
    high = data.draw(st.integers(low, start + size))
    taken = cut_off(low, high, start, start + size)
    assert len(taken) <= 2
    there = {*range(low, high), *taken}
    for position in range(low, high):
        partner = start + ((position - start) ^ 1)
        assert partner in there or partner == start + size


def test_what_can_not_be_read_is_mixed_into_nothing():
    share = ShardPlan(6, 1, 6, 0, 1, True).micro_shares(0, 6)[0]
    readable = np.array([True, True, True, False, True, True])
    assert share.pairs(0, readable).tolist() == [[0, 4], [1, 5]]

    sample = int(SampleOrder(0, 6).samples(np.arange(6))[3])
    feed = make_feed(6, ShardPlan(6, 1, 6, 0, 1, True), rows=Unreadable(6, [sample]))
    micro = next(feed.from_position(0)).micro_batches[0]
    mixed = Mixing(configured("elem"), 51, 0.0, 0)(micro, 0)
    assert (mixed.targets > 0).sum(1).tolist() == [2, 2, 1, 1, 2, 2]
    assert mixed.weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0, 1 / 6, 1 / 6])


def test_the_last_of_an_odd_batch_is_left_as_it_is():
    mixed = Mixing(configured("pair"), CLASSES, 0.1, 0)(whole_batch(count=5), 0)
    assert torch.equal(mixed.images[4], IMAGES[4])
    assert torch.equal(mixed.targets[4:], timm.data.mixup.mixup_target(LABELS[4:5], CLASSES, 1.0, 0.1))


@pytest.mark.parametrize("mode", MIX_MODES)
def test_from_its_last_position_on_nothing_is_mixed_and_targets_stay_smoothed_as_timms(mode):
    config = configured(mode)
    always, ending = Mixing(config, CLASSES, 0.1, 3), Mixing(config, CLASSES, 0.1, 3, end=24)
    for start in (12, 23):  # the second reaches beyond the end: a batch belongs to the epoch of its first position
        before, usual = ending(whole_batch(start=start), start), always(whole_batch(start=start), start)
        assert torch.equal(before.images, usual.images)
        assert torch.equal(before.targets, usual.targets)
        assert not torch.equal(before.images, IMAGES)
    off = timms(config)
    off.mixup_enabled = False  # as timm's train.py does
    images, targets = off(IMAGES.clone(), LABELS)
    for start in (24, 36):
        after = ending(whole_batch(start=start), start)
        assert torch.equal(after.images, images)
        assert torch.equal(after.targets, targets)
        assert torch.equal(after.targets.argmax(1), LABELS)


def test_losses_of_soft_targets_are_timms():
    logits = torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(1))
    targets = Mixing(BOTH, CLASSES, 0.1, 0)(whole_batch(), 0).targets
    ours = torch.nn.functional.cross_entropy(logits, targets, reduction="none").mean()
    torch.testing.assert_close(ours, timm.loss.SoftTargetCrossEntropy()(logits, targets), rtol=1e-6, atol=0)
    smoothed = torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, timm.loss.LabelSmoothingCrossEntropy(0.1)(logits, LABELS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ERASE_MODES)
def test_erasing_is_timms_and_depends_on_the_position_alone(mode):
    config, positions = AugmentConfig(erase_prob=0.7, erase_mode=mode, erase_count=3), np.arange(50, 170)
    images = IMAGES.repeat(10, 1, 1, 1)
    erased = Erasing(config, 7, CPU)(images.clone(), positions)
    theirs, expected = RandomErasing(0.7, mode=mode, max_count=3, device="cpu"), images.clone()
    for row, position in enumerate(positions.tolist()):
        seed = derive_seed(derive_seed(7, 0x657261), position) % 2**63
        random.seed(seed), torch.manual_seed(seed)
        theirs(expected[row])
    assert torch.equal(erased, expected)
    untouched = [torch.equal(*pair) for pair in zip(erased, images, strict=True)]
    assert 20 < sum(untouched) < 52
    assert torch.equal(Erasing(config, 7, CPU)(images[[5]].clone(), positions[[5]])[0], erased[5])


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_is_timms_and_leaves_the_global_generators_alone(channels):
    words, positions = "rand-m9-n3-mstd0.5-inc1", np.arange(100, 120)
    pixels = np.random.RandomState(0).randint(0, 256, (20, 16, 16, channels)).astype(np.uint8)
    random.seed(5), np.random.seed(5)
    expected_draws = (random.random(), np.random.random())
    random.seed(5), np.random.seed(5)
    ours = Augment(AugmentConfig(rand_augment=words), 9, [0.2, 0.4, 0.6][:channels]).pixels(pixels, positions)
    assert (random.random(), np.random.random()) == expected_draws
    fill = (51, 102, 153) if channels == 3 else 51
    transform = rand_augment_transform(words, {"img_mean": fill})
    for row, position in enumerate(positions.tolist()):
        seed = derive_seed(derive_seed(9, 0x72616E64), position)
        random.seed(seed), np.random.seed(seed % 2**32)
        image = Image.fromarray(pixels[row] if channels == 3 else pixels[row, :, :, 0])
        assert np.array_equal(np.asarray(transform(image)).reshape(16, 16, channels), ours[row])
    assert sum(not np.array_equal(*pair) for pair in zip(ours, pixels, strict=True)) > 10


def test_a_feed_gives_what_rand_augment_makes_of_its_rows():
    pixels = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 1)).astype(np.uint8)
    block = {"image": pixels, "label": np.arange(6), "sample": np.arange(6)}
    rows = CachedRows(SimpleNamespace(iter_batches=lambda **_: iter([block])))
    info = DataInfo([str(n) for n in range(6)], 8, 1, [0.0], [1.0], {})
    augment, order = Augment(AugmentConfig(rand_augment="rand-m9-inc1"), 2, info.mean), SampleOrder(0, 6)
    to_tensors = ToTensors(info, CPU, False)
    batch = next(IndexedFeed(rows, order, ShardPlan(6, 1, 12, 0, 1), to_tensors, augment).from_position(6))
    changed = augment.pixels(pixels[order.samples(np.arange(6, 12))], np.arange(6, 12))
    assert np.array_equal(to_tensors.pixels(batch.micro_batches[0].images), changed)


def test_the_contact_sheet_shows_what_is_erased_and_mixed():
    pixels = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    info = DataInfo([str(n) for n in range(10)], 8, 3, [0.5] * 3, [0.25] * 3, {})
    augment = AugmentConfig(erase_prob=0.5, mixup_alpha=0.8, cutmix_alpha=1.0)
    train = SimpleNamespace(channels_last=False, global_batch_size=8, label_smoothing=0.0)
    seen = as_the_model_sees(SimpleNamespace(augment=augment, train=train, seed=5), info, pixels)

    to_tensors, plan = ToTensors(info, CPU, False), ShardPlan(8, 1, 12, 0, 1, augment.mixes)
    for start, end in plan.batch_ends(0):
        (share,) = plan.micro_shares(start, end)
        own = share.positions
        images = Erasing(augment, 5, CPU)(to_tensors(pixels[own], Augment(augment, 5), own), own)
        labels = torch.from_numpy(own % 10)
        batch = MicroBatch(images, labels, torch.ones(len(own)), own, share.pairs(start, None), share.num_partners)
        assert np.array_equal(to_tensors.pixels(Mixing(augment, 10, 0.0, 5)(batch, start).images), seen[start:end])
    assert not np.array_equal(seen, pixels)
