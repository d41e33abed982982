"""Augmentation of one picture during decoding, in timm's order: crop, flips, auto_augment, colour, grey, blur.

The user's own augmentations come last.

The result depends only on (seed, position) and the picture. All operations draw from one stream per position, in the
order in which timm's transforms draw from the global generators. torch is imported only if it scales the picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from ftexp.config.schema import AugmentConfig
from ftexp.data.augment.auto_augment import AutoAugment, hparams_of
from ftexp.data.augment.registry import augmentations
from ftexp.data.cropping import Fit, RandomCrop, fitted
from ftexp.data.decoder import RESAMPLING, Picture, UInt8s, as_pillow, pixels_of
from ftexp.data.order import Int64s, derive_seed
from ftexp.registry import load_plugins

_STREAM = 0x706963  # keeps these draws apart from other uses of the run's seed
_SCALES = {"rrc": (0.08, 1.0), "rkrc": (0.8, 1.0), "rkrr": (0.8, 1.0)}  # timm's defaults
_RATIOS = {"rrc": (3 / 4, 4 / 3), "rkrc": (0.9, 1 / 0.9), "rkrr": (0.9, 1 / 0.9)}
_ENHANCERS: tuple[Any, ...] = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_BLUR_HALF = 11  # taps on each side of the centre: timm's kernel_size=23
_BLUR_SIGMAS = (0.1, 2.0)
_TAP_UNIT = 2.0**-22


class PictureAugment:
    """Augments pictures of any size, with one or three channels, to uint8 [size, size, channels]."""

    def __init__(self, config: AugmentConfig, seed: int, fit: Fit, plugins: Sequence[str] = ()) -> None:
        """fit: applied to whole pictures if `config.crop` is none. plugins: modules that register `config.custom`."""
        self._config, self._run_seed, self._fit, self._plugins = config, seed, fit, plugins
        load_plugins(plugins if config.custom else ())  # needed in each process that decodes
        self._custom = augmentations(config.custom)
        self._seed = derive_seed(seed, _STREAM)
        self._crop = _crop(config, fit.size) if config.crop != "none" else None
        self._auto_augment = _auto_augment(config, fit) if config.auto_augment is not None else None
        self._draws = random.Random() if self._auto_augment is None else self._auto_augment.draws
        self._jitter = strengths(config.color_jitter)
        self._position, self._view = 0, 0

    @property
    def crops(self) -> bool:
        """Whether pictures are cropped, so that they are needed at their own size."""
        return self._crop is not None

    def __call__(self, picture: Picture, position: int, is_fitted: bool = False) -> UInt8s:
        """Return the picture for the training step at `position`. is_fitted: it already has the final size.

        With `augment.splits`, `position` is the number of a view: see `view_positions`.
        """
        self.seed(position)
        return self.changed(self.cropped(picture, is_fitted))

    def seed(self, position: int) -> None:
        """Start the random stream of a position; then call `cropped` and `changed`, as `__call__` does."""
        self._position, self._view = divmod(position, self._config.splits)
        self._begin(derive_seed(self._seed, self._position))

    def _begin(self, seed: int) -> None:
        self._auto_augment.seed(seed) if self._auto_augment is not None else self._draws.seed(seed)

    def cropped(self, picture: Picture, is_fitted: bool = False) -> UInt8s:
        """Crop or fit the picture to the final size: [size, size, channels]."""
        if self._crop is not None:
            return self._crop(picture, self._draws)
        return pixels_of(picture) if is_fitted else fitted(picture, self._fit)

    def changed(self, pixels: UInt8s) -> UInt8s:
        """Apply all operations after the crop."""
        config = self._config
        if self._happens(config.hflip):
            pixels = pixels[:, ::-1]
        if self._happens(config.vflip):
            pixels = pixels[::-1]
        if config.splits > 1:  # all views share the crop and the flips
            if self._view == 0:
                return pixels
            self._begin(derive_seed(self._seed, self._position, self._view))
        if self._auto_augment is not None or self._jitter or config.grayscale:
            pixels = pixels_of(self._recoloured(as_pillow(pixels)))
        if self._happens(config.gaussian_blur):
            pixels = blurred(pixels, self._draws.uniform(*_BLUR_SIGMAS))
        for name, change in zip(config.custom, self._custom, strict=True):
            pixels = _checked(name, change(pixels, self._draws), pixels.shape)
        return pixels

    def _recoloured(self, image: Image.Image) -> Image.Image:
        """Apply the operations that need Pillow: auto_augment, colour and grey."""
        config = self._config
        if self._auto_augment is not None:
            image = self._auto_augment(image)
        if self._jitter and (config.color_jitter_prob is None or self._happens(config.color_jitter_prob)):
            for change in jitters(self._jitter, self._draws):
                image = change(image)
        return image.convert("L").convert(image.mode) if self._happens(config.grayscale) else image

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the arguments, not the generators and the copied timm module."""
        return PictureAugment, (self._config, self._run_seed, self._fit, self._plugins)

    def _happens(self, probability: float) -> bool:
        """Draw whether to apply an operation; without a draw if its probability is 0."""
        return probability > 0 and self._draws.random() < probability


def _checked(name: str, found: Any, shape: tuple[int, ...]) -> UInt8s:
    """Return the result of the user's augmentation; TypeError if it isn't uint8 pixels of the given shape."""
    if not isinstance(found, np.ndarray) or found.dtype != np.uint8 or found.shape != shape:
        made = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise TypeError(f"augment.custom: {name} returned {made}: return an array of uint8 {list(shape)}")
    return found


def view_positions(positions: Int64s, splits: int) -> Int64s:
    """Return a number for each view of each position, [positions * splits]; the views of a position are adjacent."""
    numbers: Int64s = (positions[:, None] * splits + np.arange(splits)).reshape(-1)
    return numbers


def _crop(config: AugmentConfig, size: int) -> RandomCrop:
    low, high = config.scale or _SCALES[config.crop]
    min_ratio, max_ratio = config.ratio or _RATIOS[config.crop]
    return RandomCrop(config.crop, size, (low, high), (min_ratio, max_ratio), config.interpolation)


def _auto_augment(config: AugmentConfig, fit: Fit) -> AutoAugment:
    assert config.auto_augment is not None
    resampling = RESAMPLING.get(config.interpolation)
    return AutoAugment(config.auto_augment, hparams_of(config.auto_augment, fit.size, fit.mean, resampling))


def strengths(color_jitter: float | Sequence[float] | None) -> list[float]:
    """Return brightness, contrast, saturation and hue of `augment.color_jitter`; [] if it is None."""
    if color_jitter is None:
        return []
    if isinstance(color_jitter, (int, float)):
        return [color_jitter] * len(_ENHANCERS) + [0.0]
    return [*color_jitter, 0.0][:4]


def jitters(strengths: Sequence[float], draws: random.Random) -> list[Callable[[Image.Image], Image.Image]]:
    """Draw the changes of torchvision's ColorJitter, in their order of application; none for a strength of 0."""
    *enhancing, hue = strengths
    changes = [
        _enhance(enhancer, draws.uniform(max(0.0, 1 - strength), 1 + strength))
        for enhancer, strength in zip(_ENHANCERS, enhancing, strict=True)
        if strength
    ]
    if hue:
        changes.append(_turn_hue(draws.uniform(-hue, hue)))
    draws.shuffle(changes)
    return changes


def _enhance(enhancer: Any, factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: enhancer(image).enhance(factor)


def _turn_hue(share: float) -> Callable[[Image.Image], Image.Image]:
    """Return a function that rotates the hue by a share of the colour circle; it leaves grey images unchanged."""

    def turn(image: Image.Image) -> Image.Image:
        if image.mode == "L":
            return image
        hue, saturation, value = image.convert("HSV").split()
        turned = hue.point([(old + int(share * 255)) % 256 for old in range(256)])
        return Image.merge("HSV", (turned, saturation, value)).convert(image.mode)

    return turn


def blurred(pixels: UInt8s, sigma: float) -> UInt8s:
    """Return torchvision's gaussian_blur with 23 taps, [height, width, channels]; the image is mirrored at its edges.

    Weights are multiples of 2**-22, so that sums are exact: the same on any CPU, in any order of summation.
    """
    values = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-_BLUR_HALF, _BLUR_HALF + 1)]
    taps = [round(value / sum(values) / _TAP_UNIT) * _TAP_UNIT for value in values]
    found: npt.NDArray[np.float64] = pixels.astype(np.float64)
    for axis in (0, 1):
        margins = [(_BLUR_HALF, _BLUR_HALF) if each == axis else (0, 0) for each in range(3)]
        padded = np.moveaxis(np.pad(found, margins, mode="reflect"), axis, 0)
        length = found.shape[axis]
        weighted = np.zeros_like(padded[:length])
        for start, tap in enumerate(taps):
            weighted += tap * padded[start : start + length]
        found = np.moveaxis(weighted, 0, axis)
    return found.round().clip(0, 255).astype(np.uint8)
