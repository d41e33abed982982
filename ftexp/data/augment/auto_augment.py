"""AutoAugment, RandAugment, AugMix and 3-Augment, by timm's own code, image by image.

timm draws from Python's and numpy's global generators, which the training thread uses, while a feed may run on another
thread. So this module uses a copy of timm's module with its own generators; the draws are the same. It imports nothing
else of timm, and so not torch, whose import would slow decoding tasks down.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ftexp.config.timm_names import timm_directory
from ftexp.data.cropping import fill_color
from ftexp.data.order import Int64s, derive_seed
from ftexp.data.sources.arrays import UInt8s

_STREAM = 0x72616E64  # keeps RandAugment's draws apart from other uses of the run's seed
_GREY = 0.5  # fill colour at the edges if the data's mean isn't given
# as in timm's create_transform: maximum shifts, as a share of the image size
_TRANSLATE_SHARE = 0.45
_AUGMIX_TRANSLATE_PCT = 0.3


class AutoAugment:
    """timm's auto_augment for Pillow images. `seed` seeds `draws`, which callers may also use for their own draws."""

    def __init__(self, words: str, hparams: dict[str, Any]) -> None:
        """words: timm's notation, for example rand-m9-mstd0.5-inc1, original, v0, augmix-m3 or 3a."""
        self.draws, self._numpy_draws = random.Random(), np.random.RandomState()
        module = _copy_of_timms()
        module.random, module.np, module.ImageOps = self.draws, _Numpy(self._numpy_draws), _ImageOps()
        make = {"rand": module.rand_augment_transform, "augmix": module.augment_and_mix_transform}
        self._transform = make.get(words.partition("-")[0], module.auto_augment_transform)(words, hparams)

    def seed(self, seed: int) -> None:
        """Start the random stream of one image."""
        self.draws.seed(seed)
        self._numpy_draws.seed(seed % 2**32)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return an augmented copy, with the next draws of the stream."""
        changed: Image.Image = self._transform(image)
        return changed


def hparams_of(words: str, size: int, mean: Sequence[float], resampling: Image.Resampling | None) -> dict[str, Any]:
    """Return the hparams that timm's create_transform uses. `resampling`: None for a random one per operation."""
    hparams: dict[str, Any] = {"translate_const": int(size * _TRANSLATE_SHARE), "img_mean": fill_color(mean)}
    if resampling is not None:
        hparams["interpolation"] = resampling
    if words.startswith("augmix"):
        hparams["translate_pct"] = _AUGMIX_TRANSLATE_PCT
    return hparams


class RandAugment:
    """`augment.rand_augment` for uint8 images [rows, height, width, channels] with one or three channels."""

    def __init__(self, words: str, seed: int, mean: Sequence[float]) -> None:
        self._seed = derive_seed(seed, _STREAM)
        self._augment = AutoAugment(words, {"img_mean": fill_color(mean or (_GREY,))})

    def __call__(self, rows: UInt8s, positions: Int64s) -> UInt8s:
        """Return an augmented copy; the draws of row i depend on `positions[i]`."""
        changed = np.empty_like(rows)
        for number, position in enumerate(positions.tolist()):
            self._augment.seed(derive_seed(self._seed, position))
            image = Image.fromarray(rows[number, :, :, 0] if rows.shape[3] == 1 else rows[number])
            changed[number] = np.asarray(self._augment(image)).reshape(rows.shape[1:])
        return changed


class _Numpy:
    """numpy with another generator as `numpy.random`."""

    def __init__(self, generator: np.random.RandomState) -> None:
        self.random = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class _ImageOps:
    """PIL.ImageOps with a posterize that returns a black image for 0 bits, as in older Pillow.

    timm may draw 0 bits, which Pillow's own posterize rejects.
    """

    def posterize(self, image: Image.Image, bits: int) -> Image.Image:
        return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)

    def __getattr__(self, name: str) -> Any:
        return getattr(ImageOps, name)


def _copy_of_timms() -> Any:
    path = timm_directory() / "data" / "auto_augment.py"  # importing it by name would import all of timm
    spec = importlib.util.spec_from_file_location("timm.data.auto_augment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
