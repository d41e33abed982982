"""AutoAugment, RandAugment, AugMix and 3-Augment, by timm's own code, image by image.

timm draws from Python's and numpy's global generators. Those are the training thread's, and a feed may run on another:
so this works with a copy of timm's module that has generators of its own. They are drawn from as the global ones are.
Nothing else of timm is imported, and so no torch, which tasks that decode would pay for.
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
_GREY = 0.5  # what moves in at the edges, where the data's mean isn't given
_TRANSLATE_SHARE = 0.45  # maximum shift of a policy that shifts by pixels; these three as in timm's create_transform
_AUGMIX_TRANSLATE_PCT = 0.3


class AutoAugment:
    """timm's auto_augment, called with Pillow images. `draws` is seeded by `seed`, and may be drawn from besides."""

    def __init__(self, words: str, hparams: dict[str, Any]) -> None:
        """words: timm's notation, for example rand-m9-mstd0.5-inc1, original, v0, augmix-m3 or 3a."""
        self.draws, self._numpy_draws = random.Random(), np.random.RandomState()
        module = _copy_of_timms()
        module.random, module.np, module.ImageOps = self.draws, _Numpy(self._numpy_draws), _ImageOps()
        make = {"rand": module.rand_augment_transform, "augmix": module.augment_and_mix_transform}
        self._transform = make.get(words.partition("-")[0], module.auto_augment_transform)(words, hparams)

    def seed(self, seed: int) -> None:
        """Begin the stream of draws of one image."""
        self.draws.seed(seed)
        self._numpy_draws.seed(seed % 2**32)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a changed copy, drawing on in the stream."""
        changed: Image.Image = self._transform(image)
        return changed


def hparams_of(words: str, size: int, mean: Sequence[float], resampling: Image.Resampling | None) -> dict[str, Any]:
    """Return hparams as timm's create_transform makes them. `resampling`: None for a random one at each operation."""
    hparams: dict[str, Any] = {"translate_const": int(size * _TRANSLATE_SHARE), "img_mean": fill_color(mean)}
    if resampling is not None:
        hparams["interpolation"] = resampling
    if words.startswith("augmix"):
        hparams["translate_pct"] = _AUGMIX_TRANSLATE_PCT
    return hparams


class RandAugment:
    """`augment.rand_augment`: called with uint8 images [rows, height, width, channels], of one or three channels."""

    def __init__(self, words: str, seed: int, mean: Sequence[float]) -> None:
        self._seed = derive_seed(seed, _STREAM)
        self._augment = AutoAugment(words, {"img_mean": fill_color(mean or (_GREY,))})

    def __call__(self, rows: UInt8s, positions: Int64s) -> UInt8s:
        """Return a changed copy; row i as `positions[i]` says."""
        changed = np.empty_like(rows)
        for number, position in enumerate(positions.tolist()):
            self._augment.seed(derive_seed(self._seed, position))
            image = Image.fromarray(rows[number, :, :, 0] if rows.shape[3] == 1 else rows[number])
            changed[number] = np.asarray(self._augment(image)).reshape(rows.shape[1:])
        return changed


class _Numpy:
    """numpy with other random numbers."""

    def __init__(self, generator: np.random.RandomState) -> None:
        self.random = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class _ImageOps:
    """PIL.ImageOps, whose posterize refuses the 0 bits that timm may draw: a black image, as in older Pillow."""

    def posterize(self, image: Image.Image, bits: int) -> Image.Image:
        return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)

    def __getattr__(self, name: str) -> Any:
        return getattr(ImageOps, name)


def _copy_of_timms() -> Any:
    path = timm_directory() / "data" / "auto_augment.py"  # found by its name, it would come with all of timm
    spec = importlib.util.spec_from_file_location("timm.data.auto_augment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
