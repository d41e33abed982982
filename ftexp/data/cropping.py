"""Cropping and scaling of a picture to the final square, as in timm: fitted for evaluation, random for training.

Only cropping a box and scaling it work at the picture's full size; the library that decoded the picture does both: see
`ftexp.data.decoder`. Draws come from the given generator, in timm's order. Tests compare every function with timm's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from ftexp.data.decoder import RESAMPLING, Decoding, Picture, UInt8s, pixels_of, scaled, size_of

_RANDOM = "random"
_TRIES = 10  # attempts to draw a box; then the largest centred one is used
_RKR_PROB = 0.5  # rkrc, rkrr: probability of changing the scale, and of changing the ratio


@dataclass(frozen=True)
class Fit:
    """Settings for fitting a whole picture into a square, as in `data.crop_pct`, `crop_mode` and `interpolation`."""

    size: int
    channels: int = 3
    crop_pct: float | None = None  # side of the square / side after scaling; see `fitted`
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = ()  # per channel, of pixels scaled to 0..1; fills the border of crop_mode=border
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def side(self) -> int:
        """Maximum length in pixels of the picture's shorter side after scaling, before the square is cropped."""
        return math.floor(self.size / (self.crop_pct or 1.0))


def fitted(picture: Picture, fit: Fit) -> UInt8s:
    """Scale and crop as timm's transforms_imagenet_eval does; without `crop_pct`, use the largest centred square.

    That square is cropped and scaled in one step, where timm scales first, to whole pixels. For Pillow's images
    (ImageOps.fit) the box may start between pixels; for others it starts at whole pixels.

    Returns:
        [size, size, channels].
    """
    resample, square = RESAMPLING[fit.interpolation], (fit.size, fit.size)
    width, height = size_of(picture)
    if fit.crop_pct is None and fit.crop_mode == "center":
        if (width, height) == square:
            return pixels_of(picture)
        if isinstance(picture, Image.Image):
            return pixels_of(ImageOps.fit(picture, square, resample))
        shorter = min(width, height)
        left, top = (width - shorter) // 2, (height - shorter) // 2
        return scaled(picture, square, resample, (left, top, left + shorter, top + shorter))
    side = fit.side
    if fit.crop_mode == "squash":
        width, height = side, side
    elif fit.crop_mode == "border":
        ratio = max(width / side, height / side)
        width, height = max(1, round(width / ratio)), max(1, round(height / ratio))
    else:
        shorter = min(width, height)
        width, height = int(side * width / shorter), int(side * height / shorter)
    return _in_the_centre(scaled(picture, (width, height), resample), fit)


def _in_the_centre(pixels: UInt8s, fit: Fit) -> UInt8s:
    """Return a square of the final size: longer sides are cropped to the centre, shorter ones padded with the mean."""
    height, width, channels = pixels.shape
    canvas = np.empty((fit.size, fit.size, channels), np.uint8)
    canvas[:] = fill_color(fit.mean)
    left, top = _centred(width, fit.size), _centred(height, fit.size)
    inside = pixels[max(top, 0) :, max(left, 0) :][: fit.size, : fit.size]
    rows, columns = inside.shape[:2]
    canvas[max(-top, 0) : max(-top, 0) + rows, max(-left, 0) : max(-left, 0) + columns] = inside
    return canvas


def fill_color(mean: Sequence[float]) -> int | tuple[int, ...]:
    """Return the mean per channel, of pixels in 0..1, as a Pillow colour; black if `mean` is empty."""
    values = tuple(min(255, round(255 * value)) for value in mean)
    return values if len(values) > 1 else sum(values)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of a picture, scaled to a square: timm's train_crop_mode rrc, rkrc or rkrr."""

    mode: str
    size: int
    scale: tuple[float, float]  # area of the crop, as a share of the picture
    ratio: tuple[float, float]  # width / height; rkrc, rkrr: factor on the picture's ratio
    interpolation: str  # bilinear, bicubic, or random: one of the two

    def __call__(self, picture: Picture, draws: random.Random) -> UInt8s:
        """Crop and scale; returns [size, size, channels]."""
        if self.mode == "rrc":
            box = self.box(size_of(picture), draws)
            return scaled(picture, (self.size, self.size), self._resampling(draws), box)
        size = self._scaled(size_of(picture), draws)
        return self._placed(scaled(picture, size, self._resampling(draws)), draws)

    def box(self, size: tuple[int, int], draws: random.Random) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) in a picture of this size, as timm's RandomResizedCropAndInterpolation."""
        width, height = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = draws.uniform(*self.scale) * (width * height)
            ratio = math.exp(draws.uniform(low, high))
            # at least one pixel: timm fails if it draws an empty box in a tiny picture
            across, down = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if across <= width and down <= height:
                top = draws.randint(0, height - down)
                left = draws.randint(0, width - across)
                return left, top, left + across, top + down
        across, down = width, height
        if width / height < self.ratio[0]:
            down = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            across = round(height * self.ratio[1])
        left, top = (width - across) // 2, (height - down) // 2
        return left, top, left + across, top + down

    def _resampling(self, draws: random.Random) -> Image.Resampling:
        if self.interpolation == _RANDOM:
            return draws.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        return RESAMPLING[self.interpolation]

    def _scaled(self, size: tuple[int, int], draws: random.Random) -> tuple[int, int]:
        """Return the width and height after scaling in rkrc and rkrr, as timm's ResizeKeepRatio."""
        width, height = size
        shorter = min(height / self.size, width / self.size)
        down = across = 1.0
        if draws.random() < _RKR_PROB:
            down = across = 1.0 / math.sqrt(draws.uniform(*self.scale))
        if draws.random() < _RKR_PROB:
            stretch = math.sqrt(math.exp(draws.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]))))
            down, across = down / stretch, across * stretch
        return round(width * across / shorter), round(height * down / shorter)

    def _placed(self, pixels: UInt8s, draws: random.Random) -> UInt8s:
        """Return a square from the centre (rkrc) or a random place (rkrr); pixels outside are mirrored from inside."""
        height, width, _ = pixels.shape
        if self.mode == "rkrc":
            top, left = _centred(height, self.size), _centred(width, self.size)
        else:
            top, left = (_anywhere(length - self.size, draws) for length in (height, width))
        rows, columns = _outside(top, height, self.size), _outside(left, width, self.size)
        if any((*rows, *columns)):
            pixels = np.pad(pixels, [rows, columns, (0, 0)], mode="reflect")
        left, top = max(left, 0), max(top, 0)
        return pixels[top : top + self.size, left : left + self.size]


def _centred(length: int, size: int) -> int:
    """Return the start of the middle `size` pixels of `length`; negative if `length` is shorter. Rounds as timm."""
    return round((length - size) / 2) if length > size else -((size - length) // 2)


def _anywhere(margin: int, draws: random.Random) -> int:
    start = draws.randint(0, abs(margin))
    return start if margin > 0 else -start


def _outside(start: int, length: int, size: int) -> tuple[int, int]:
    """Return how many of the `size` pixels from `start` lie before 0, and how many at `length` or later."""
    return max(-start, 0), max(start + size - length, 0)
