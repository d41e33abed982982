"""Augmentation of decoded pictures: the pixels of timm and torchvision for the same draws."""

import hashlib
import itertools
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import timm.data.auto_augment as timms
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageOps
from timm.data.transforms import (
    CenterCropOrPad,
    RandomCropOrPad,
    RandomResizedCropAndInterpolation,
    ResizeKeepRatio,
    str_to_pil_interp,
)
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torchvision.transforms import Compose

from ftexp.config.checks.validate import validate
from ftexp.config.schema import CROP_MODES, INTERPOLATIONS, AugmentConfig
from ftexp.data.augment import registry
from ftexp.data.augment.picture import PictureAugment, blurred, jitters, strengths
from ftexp.data.cropping import Fit, RandomCrop, fitted
from ftexp.data.feeds.decoding import as_sample
from ftexp.data.order import derive_seed
from ftexp.errors import ConfigError, UnknownNameError
from tests.support.configs import composed

SIZE, MEAN = 24, (0.2, 0.4, 0.6)
FIT = Fit(SIZE, 3, mean=MEAN)
PHOTOS = ("china.jpg", "flower.jpg")  # from scikit-learn
SHAPES = [(24, 24), (37, 29), (29, 90), (10, 7), (1, 1), (200, 24), (24, 3)]  # width, height


def picture(width, height, channels=3, seed=0):
    small = np.random.default_rng([seed, width, height]).integers(0, 256, (7, 7, channels), np.uint8)
    return Image.fromarray(small[..., 0] if channels == 1 else small).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(*shape, seed=number) for number, shape in enumerate(itertools.islice(itertools.cycle(SHAPES), 100))]


def seed_globals(position, seed=0):
    """Seed the global generators as the picture at this position seeds its own."""
    own = derive_seed(derive_seed(seed, 0x706963), position)
    random.seed(own), np.random.seed(own % 2**32)


def expected(transform, image, position):
    """Return the pixels of a timm or torchvision transform, with the same draws as ftexp's."""
    seed_globals(position)
    return np.asarray(transform(image))


def augmented(image, position, **config):
    return PictureAugment(AugmentConfig(**config), 0, FIT)(image, position)


def is_tiny(image):
    """Return whether timm may fail on the image, because it sometimes draws a box without pixels."""
    return min(image.size) < 4


# crops


@pytest.mark.parametrize("interpolation", ["random", *INTERPOLATIONS])
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 0.4), (0.2, 5.0)), ((1.0, 1.0), (1.0, 1.0))]
)
def test_a_random_resized_crop_is_timms_for_100_boxes(interpolation, scale, ratio):
    theirs = RandomResizedCropAndInterpolation(SIZE, scale, ratio, interpolation)
    config = {"crop": "rrc", "scale": list(scale), "ratio": list(ratio), "interpolation": interpolation}
    for position, image in enumerate(PICTURES):
        if not is_tiny(image):
            np.testing.assert_array_equal(augmented(image, position, **config), expected(theirs, image, position))


@pytest.mark.parametrize("interpolation", ["random", *INTERPOLATIONS])
@pytest.mark.parametrize("mode", ["rkrc", "rkrr"])
@pytest.mark.parametrize(("scale", "ratio"), [((0.8, 1.0), (0.9, 1 / 0.9)), ((0.3, 0.5), (0.2, 5.0))])
def test_a_crop_that_keeps_the_ratio_is_timms_for_100_boxes(mode, interpolation, scale, ratio):
    resize = ResizeKeepRatio(
        SIZE,
        interpolation=interpolation,
        random_scale_prob=0.5,
        random_scale_range=scale,
        random_scale_area=True,
        random_aspect_prob=0.5,
        random_aspect_range=ratio,
    )
    theirs = Compose([resize, {"rkrc": CenterCropOrPad, "rkrr": RandomCropOrPad}[mode](SIZE, padding_mode="reflect")])
    config = {"crop": mode, "scale": list(scale), "ratio": list(ratio), "interpolation": interpolation}
    for position, image in enumerate(PICTURES):
        np.testing.assert_array_equal(augmented(image, position, **config), expected(theirs, image, position))


@pytest.mark.parametrize("mode", ["rrc", "rkrc", "rkrr"])
def test_scale_and_ratio_are_timms_by_default(mode):
    theirs = transforms_imagenet_train(
        SIZE, train_crop_mode=mode, hflip=0, color_jitter=None, normalize=False, mean=MEAN, interpolation="random"
    )
    for position, image in enumerate(PICTURES):
        if not is_tiny(image):
            ours = augmented(image, position, crop=mode)
            np.testing.assert_array_equal(ours, expected(theirs, image, position).transpose(1, 2, 0))


def test_boxes_are_distributed_as_timms_over_100_000_draws():
    size, scale, ratio = (500, 375), (0.08, 1.0), (3 / 4, 4 / 3)
    crop, draws, blank = RandomCrop("rrc", SIZE, scale, ratio, "random"), random.Random(0), Image.new("L", size)
    ours = np.array([crop.box(size, draws) for _ in range(100_000)], float)
    random.seed(1)
    their_boxes = (RandomResizedCropAndInterpolation.get_params(blank, scale, ratio) for _ in range(100_000))
    theirs = np.array([(left, top, left + width, top + height) for top, left, height, width in their_boxes], float)
    for measure in (
        lambda boxes: (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (500 * 375),
        lambda boxes: np.log((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])),
        lambda boxes: (boxes[:, 0] + boxes[:, 2]) / 1000,
        lambda boxes: (boxes[:, 1] + boxes[:, 3]) / 750,
    ):
        one, other = measure(ours), measure(theirs)
        error = 4 * one.std() / np.sqrt(len(one) / 2)
        assert abs(one.mean() - other.mean()) < error
        quantiles = np.linspace(0.1, 0.9, 9)
        assert np.abs(np.quantile(one, quantiles) - np.quantile(other, quantiles)).max() < 2 * error


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 40)])
@pytest.mark.parametrize("mode", ["rrc", "rkrc", "rkrr"])
def test_a_tiny_picture_is_cropped_at_each_of_500_positions(mode, size):
    augment = PictureAugment(AugmentConfig(crop=mode), 0, FIT)
    assert {augment(picture(*size), position).shape for position in range(500)} == {(SIZE, SIZE, 3)}


# evaluation


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("crop_pct", [0.3, 0.875, 0.95, 1.0])
def test_a_picture_is_evaluated_as_timm_evaluates_it(crop_pct, mode, interpolation):
    theirs = transforms_imagenet_eval(
        SIZE, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation, mean=MEAN, normalize=False
    )
    fit = Fit(SIZE, 3, crop_pct, mode, interpolation, MEAN)
    for image in PICTURES:
        np.testing.assert_array_equal(np.asarray(fitted(image, fit)), theirs(image).permute(1, 2, 0).numpy())


def test_without_crop_pct_a_picture_is_fitted_as_before_there_was_one():
    for image in PICTURES:
        before = Image.Image.copy(image) if image.size == (SIZE, SIZE) else _fit_of_before(image)
        np.testing.assert_array_equal(np.asarray(fitted(image, FIT)), np.asarray(before))


def _fit_of_before(image):
    return ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)


# after the crop

WORDS = [
    *("rand-m9-mstd0.5-inc1", "rand-m15-n3-mmax20-p0.7", "rand-m9-n2-tweights", "rand-m9-t3aw", "original", "v0"),
    *("originalr-mstd0.5", "v0r", "augmix", "augmix-m5-w4-d2", "augmix-m3-a0.5-b1-mstd1", "3a"),
]


@pytest.mark.parametrize("interpolation", ["random", "bilinear"])
@pytest.mark.parametrize("words", WORDS)
def test_auto_augment_after_a_crop_is_timms(words, interpolation, monkeypatch):
    posterize = ImageOps.posterize  # rejects 0 bits, which v0 draws; older Pillow returned black, and so does ftexp
    black = Image.new("RGB", (SIZE, SIZE))
    monkeypatch.setattr("PIL.ImageOps.posterize", lambda image, bits: posterize(image, bits) if bits else black)
    theirs = transforms_imagenet_train(
        SIZE, hflip=0, color_jitter=None, auto_augment=words, interpolation=interpolation, mean=MEAN, normalize=False
    )
    images = [image for image in PICTURES if not is_tiny(image)][:40]
    for position, image in enumerate(images):
        pixels = expected(theirs, image, position)
        ours = augmented(image, position, crop="rrc", auto_augment=words, interpolation=interpolation)
        np.testing.assert_array_equal(ours, pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("words", WORDS)
def test_auto_augment_has_an_answer_at_each_of_3_000_positions(words, channels):
    fit = Fit(4, channels, mean=MEAN[:channels])
    augment, image = PictureAugment(AugmentConfig(auto_augment=words), 0, fit), picture(4, 4, channels)
    changed = [augment(image, position) for position in range(3_000)]
    assert {pixels.shape for pixels in changed} == {(4, 4, channels)}
    assert np.mean([(pixels != changed[0]).any() for pixels in changed]) > 0.1


@pytest.mark.parametrize(("config", "turned"), [({"hflip": 1.0}, F.hflip), ({"vflip": 1.0}, F.vflip)])
def test_flips_mirror_the_fitted_picture(config, turned):
    image = picture(40, 30)
    whole = Image.fromarray(fitted(image, FIT))
    np.testing.assert_array_equal(augmented(image, 3, **config), np.asarray(turned(whole)))


@pytest.mark.parametrize("name", ["hflip", "vflip", "grayscale", "gaussian_blur"])
def test_about_as_many_pictures_are_changed_as_asked_for(name):
    small = Fit(12, 3)
    augment = PictureAugment(AugmentConfig(**{name: 0.25}), 0, small)
    image = picture(12, 12)
    changed = [(augment(image, position) != np.asarray(image)).any() for position in range(2_000)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("given", [0.4, [0.4, 0.0, 0.3], [0.1, 0.2, 0.3, 0.5], [0, 0, 0, 0.1]])
def test_colour_jitter_is_torchvisions_for_the_same_factors_in_the_same_order(given, monkeypatch):
    drawn = []

    class Noted(random.Random):
        def uniform(self, low, high):
            drawn.append((low, high, super().uniform(low, high)))
            return drawn[-1][-1]

        def shuffle(self, values):
            drawn.append(list(values))
            super().shuffle(values)

    for seed, image in enumerate(PICTURES[:40]):
        drawn.clear()
        ours, draws = image, Noted(seed)
        changes = jitters(strengths(given), draws)
        for change in changes:
            ours = change(ours)
        *factors, made = drawn
        wanted = [(F.adjust_brightness, 0), (F.adjust_contrast, 1), (F.adjust_saturation, 2), (F.adjust_hue, 3)]
        used = [(function, strengths(given)[kind]) for function, kind in wanted if strengths(given)[kind]]
        theirs = image
        for change in changes:
            function, _ = used[made.index(change)]
            theirs = function(theirs, factors[made.index(change)][-1])
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        for (function, strength), (low, high, _) in zip(used, factors, strict=True):
            center = 0 if function is F.adjust_hue else 1
            assert (low, high) == (center - strength, center + strength)


def test_the_order_of_colour_changes_is_drawn():
    draws = random.Random(0)
    firsts = Counter(jitters([0.4, 0.4, 0.4, 0.1], draws)[0].__qualname__.split(".")[0] for _ in range(1_000))
    assert firsts["_turn_hue"] == pytest.approx(250, abs=50)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_is_torchvisions(channels):
    image, fit = picture(SIZE, SIZE, channels), Fit(SIZE, channels)
    ours = PictureAugment(AugmentConfig(grayscale=1.0), 0, fit)(image, 0)
    np.testing.assert_array_equal(ours, np.asarray(F.to_grayscale(image, channels)).reshape(SIZE, SIZE, channels))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0])
def test_a_blur_is_torchvisions_but_for_its_rounding(sigma):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    theirs = F.gaussian_blur(torch.from_numpy(pixels).permute(2, 0, 1), [23, 23], [sigma, sigma]).permute(1, 2, 0)
    apart = np.abs(blurred(pixels, sigma).astype(int) - theirs.numpy())
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3  # torchvision sums in float32, ftexp exactly


# positions

EVERYTHING = AugmentConfig(
    crop="rrc",
    hflip=0.5,
    vflip=0.2,
    auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=[0.3, 0.3, 0.3, 0.1],
    color_jitter_prob=0.8,
    grayscale=0.2,
    gaussian_blur=0.2,
)


def test_a_picture_is_changed_by_seed_and_position_alone():
    augment = PictureAugment(EVERYTHING, 1, FIT)
    in_order = [augment(image, position) for position, image in enumerate(PICTURES)]
    other = pickle.loads(pickle.dumps(augment))
    for position in reversed(range(len(PICTURES))):
        np.testing.assert_array_equal(other(PICTURES[position], position), in_order[position])
    image = PICTURES[1]
    assert (augment(image, 7) != augment(image, 8)).any()
    assert (augment(image, 7) != PictureAugment(EVERYTHING, 2, FIT)(image, 7)).any()


def test_augmentations_of_ones_own_come_last_and_draw_by_position(monkeypatch, tmp_path):
    """Also in a process that hasn't imported the plug-in."""
    (tmp_path / "own_pictures.py").write_text(
        "import numpy as np\n"
        "from ftexp.plugins import register_augmentation\n"
        "@register_augmentation('fill')\n"
        "def fill(pixels, draws):\n"
        "    return np.full_like(pixels, 10 + draws.randrange(100))\n"
        "@register_augmentation('double')\n"
        "def double(pixels, draws):\n"
        "    return pixels * 2\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry._augmentations, "_entries", {})
    config = AugmentConfig(gaussian_blur=1.0, custom=["fill", "double"])
    augment = PictureAugment(config, 1, FIT, ["own_pictures"])
    found = [augment(PICTURES[1], position) for position in (3, 4, 3)]
    assert [len(np.unique(pixels)) for pixels in found] == [1, 1, 1]
    assert found[0][0, 0, 0] == found[2][0, 0, 0] != found[1][0, 0, 0]
    assert found[0][0, 0, 0] >= 20
    pickled = pickle.dumps(augment)
    del sys.modules["own_pictures"]  # as if in another process
    registry._augmentations._entries.clear()
    np.testing.assert_array_equal(pickle.loads(pickled)(PICTURES[1], 3), found[0])
    wrong = {
        "float64": lambda pixels, _: pixels / 2,
        r"uint8 \[\d+, ": lambda pixels, _: pixels[1:],
        "NoneType": lambda *_: None,
    }
    for told, made in wrong.items():
        registry._augmentations._entries["double"] = made
        with pytest.raises(TypeError, match=rf"^augment\.custom: double returned {told}.*: return an array of uint8"):
            PictureAugment(config, 1, FIT)(PICTURES[1], 3)
    with pytest.raises(UnknownNameError, match=r"augment\.custom='dubble' is unknown\. Did you mean 'double'"):
        PictureAugment(AugmentConfig(custom=["dubble"]), 1, FIT, ["own_pictures"])
    with pytest.raises(ConfigError, match=r"^augment\.custom names fill, but no plug-in is imported: add plugins="):
        validate(composed("augment.custom=[fill]"))


def test_100_decoded_and_augmented_pictures_have_the_pixels_that_they_had():
    """If a new Pillow, timm or numpy changes them, resumed runs continue with other pixels than they started with."""
    photos = [(Path(sklearn.datasets.__file__).parent / "images" / name).read_bytes() for name in PHOTOS]
    augment, digest = PictureAugment(EVERYTHING, 1, FIT), hashlib.sha256()
    for position in range(100):
        digest.update(augment(as_sample(photos[position % 2], FIT).picture, position).tobytes())
    assert digest.hexdigest() == "3988a0ed99cbba204f73375f86f5a32b799d103025293e55b756061e9e172676"


def test_the_global_generators_are_left_alone():
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    PictureAugment(EVERYTHING, 1, FIT)(PICTURES[1], 3)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_a_task_that_augments_imports_no_torch():
    code = (
        "import sys, numpy as np; from PIL import Image; from ftexp.config.schema import AugmentConfig;"
        "from ftexp.data.augment.picture import PictureAugment; from ftexp.data.cropping import Fit;"
        "config = AugmentConfig(crop='rrc', auto_augment='rand-m9', color_jitter=0.4, gaussian_blur=1.0);"
        "PictureAugment(config, 0, Fit(8, 3, mean=(0.5,) * 3))(Image.new('RGB', (9, 9)), 1);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_timms_module_is_not_touched():
    PictureAugment(EVERYTHING, 1, FIT)(PICTURES[1], 3)
    assert timms.random is random
    assert timms.np is np
    assert str_to_pil_interp("bicubic") == Image.Resampling.BICUBIC
