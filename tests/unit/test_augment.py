"""Augmentation: a function of (seed, position) that keeps an image recognisable."""

import numpy as np
import pytest
import torch

from ftexp.config.schema import AugmentConfig
from ftexp.data.augment.auto_augment import RandAugment
from ftexp.data.augment.pixels import Augment

IMAGES = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ALL = AugmentConfig(pad_px=2, hflip=0.5, brightness=0.2)


@pytest.mark.parametrize(
    "config", [AugmentConfig(pad_px=2), AugmentConfig(hflip=0.5), AugmentConfig(brightness=0.3), ALL]
)
def test_a_sample_is_changed_by_its_position_not_by_its_batch(config):
    augment, positions = Augment(config, seed=1), np.arange(100, 164)
    together = augment(IMAGES, positions)
    assert not torch.equal(together, IMAGES)
    for row in (0, 17, 63):
        assert torch.equal(augment(IMAGES[row : row + 1], positions[row : row + 1])[0], together[row])


def test_seed_and_position_both_matter():
    positions = np.arange(64)
    ours = Augment(ALL, seed=1)(IMAGES, positions)
    assert not torch.equal(ours, Augment(ALL, seed=2)(IMAGES, positions))
    assert not torch.equal(ours, Augment(ALL, seed=1)(IMAGES, positions + 64))


def test_nothing_asked_for_changes_nothing():
    assert Augment(AugmentConfig(), seed=1)(IMAGES, np.arange(64)) is IMAGES


def test_a_shift_is_a_window_of_the_padded_image():
    most = 2
    padded = torch.nn.functional.pad(IMAGES, (most,) * 4)
    shifted, seen = Augment(AugmentConfig(pad_px=most), seed=3)(IMAGES, np.arange(64)), set()
    for row in range(64):
        windows = [
            (down, right)
            for down in range(2 * most + 1)
            for right in range(2 * most + 1)
            if torch.equal(padded[row, :, down : down + 8, right : right + 8], shifted[row])
        ]
        assert len(windows) == 1
        seen.add(windows[0])
    assert len(seen) > 15, "64 draws from 25 windows"


def test_a_flip_mirrors_about_as_many_images_as_asked_for():
    flipped = Augment(AugmentConfig(hflip=0.25), seed=0)(IMAGES.repeat(40, 1, 1, 1), np.arange(2560))
    mirrored = (flipped == IMAGES.flip(3).repeat(40, 1, 1, 1)).flatten(1).all(1)
    untouched = (flipped == IMAGES.repeat(40, 1, 1, 1)).flatten(1).all(1)
    assert bool((mirrored ^ untouched).all())
    assert mirrored.float().mean().item() == pytest.approx(0.25, abs=0.04)


def test_brightness_scales_a_whole_image_and_stays_in_range():
    half = torch.full((500, 1, 2, 2), 0.5)
    bright = Augment(AugmentConfig(brightness=0.2), seed=0)(half, np.arange(500))
    assert bool((bright == bright[:, :, :1, :1]).all())
    assert bright.min() >= 0.4
    assert bright.max() <= 0.6
    assert bright[:, 0, 0, 0].std() > 0.05


# every parameter of augment.rand_augment, and the strings of the recipes
RAND_AUGMENTS = [
    *("rand-m9-mstd0.5-inc1", "rand-m7-mstd0.5-inc1", "rand-m10-mstd101-inc1", "rand-m15-mstd0.5-mmax20-inc1"),
    *("rand-m12-n3", "rand-m9-p0.3-inc0", "rand-m9-mstd0.5-inc1-tweights", "rand-m9-n3-mstd0.5-t3a", "rand-m9-t3aw"),
]


@pytest.mark.parametrize("words", RAND_AUGMENTS)
def test_rand_augment_has_an_answer_at_each_of_5_000_positions(words):
    rows = np.random.default_rng(0).integers(0, 256, (5_000, 2, 2, 3), np.uint8)
    changed = RandAugment(words, 0, [0.5] * 3)(rows, np.arange(5_000))
    assert changed.shape == rows.shape
    assert (changed != rows).any((1, 2, 3)).mean() > 0.1


def test_posterize_at_no_bits_gives_a_black_image_and_leaves_every_other_draw_alone(monkeypatch):
    rows, positions = np.full((5_000, 4, 4, 3), 200, np.uint8), np.arange(5_000)
    rand_augment = RandAugment("rand-m9-n1-mstd0.5-inc1", 0, [0.5] * 3)
    black = (rand_augment(rows, positions) == 0).all((1, 2, 3))
    assert 1 <= black.sum() <= 20, "a few of 5,000"
    one = int(np.flatnonzero(black)[0])
    assert (rand_augment(rows[:1], np.array([one])) == 0).all()
    bits = []
    monkeypatch.setattr("PIL.ImageOps.posterize", lambda image, kept: bits.append(kept) or image)
    rand_augment(rows, positions)
    assert set(bits) == {1}, "Pillow is asked only for what it can do"
