"""How a picture becomes a square of the final size, as timm has it: all of it to evaluate, a random part to train.

Only a box and its scaling are of the picture's own size, and done by what decoded it: see `ftexp.data.decoder`. Draws
come from the generator that is given, in timm's order; tests hold every function against timm's own.
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
_TRIES = 10  # tries of a random box, before it is the largest one in the centre
_RKR_PROB = 0.5  # probability of a change of scale in rkrc and rkrr, and of one of the ratio


@dataclass(frozen=True)
class Fit:
    """How the whole picture is fitted into a square: `data.crop_pct`, `data.crop_mode` and `data.interpolation`."""

    size: int
    channels: int = 3
    crop_pct: float | None = None  # side of the square, as a share of the side that is scaled to; see `fitted`
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = ()  # per channel, of pixels scaled to 0..1; fills the border of crop_mode=border
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def side(self) -> int:
        """Pixels that the picture's shorter side is scaled to, before the square is cut out; at most."""
        return math.floor(self.size / (self.crop_pct or 1.0))


def fitted(picture: Picture, fit: Fit) -> UInt8s:
    """Scale and crop as timm's transforms_imagenet_eval does; without `crop_pct`, the largest square in the centre.

    The latter is cut out and scaled in one step, where timm scales first, to whole pixels: from between pixels where
    Pillow does it (ImageOps.fit), and else from whole ones.

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
    """Return a square of the final size.

    The middle of what is larger, and a border of the mean around what is smaller.
    """
    height, width, channels = pixels.shape
    canvas = np.empty((fit.size, fit.size, channels), np.uint8)
    canvas[:] = fill_color(fit.mean)
    left, top = _centred(width, fit.size), _centred(height, fit.size)
    inside = pixels[max(top, 0) :, max(left, 0) :][: fit.size, : fit.size]
    rows, columns = inside.shape[:2]
    canvas[max(-top, 0) : max(-top, 0) + rows, max(-left, 0) : max(-left, 0) + columns] = inside
    return canvas


def fill_color(mean: Sequence[float]) -> int | tuple[int, ...]:
    """Return the mean of pixels in 0..1, a value a channel, as a colour of Pillow's; black without one."""
    values = tuple(min(255, round(255 * value)) for value in mean)
    return values if len(values) > 1 else sum(values)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of a picture, scaled to a square: timm's train_crop_mode rrc, rkrc or rkrr."""

    mode: str
    size: int
    scale: tuple[float, float]  # area of the crop, as a share of the picture
    ratio: tuple[float, float]  # ratio of width to height; rkrc, rkrr: what it is multiplied by
    interpolation: str  # bilinear, bicubic, or random for one of them

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
            # at least a pixel: timm fails where it draws none of a tiny picture
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
        """Return the width and height that a picture is scaled to in rkrc and rkrr, as ResizeKeepRatio's."""
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
        """Return a square of it: rkrc's from the centre, rkrr's from anywhere.

        What lies outside mirrors what is inside.
        """
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
    """Return where the middle `size` pixels of `length` begin; negative if that is shorter. Rounds as timm does."""
    return round((length - size) / 2) if length > size else -((size - length) // 2)


def _anywhere(margin: int, draws: random.Random) -> int:
    start = draws.randint(0, abs(margin))
    return start if margin > 0 else -start


def _outside(start: int, length: int, size: int) -> tuple[int, int]:
    """Return how many of `size` pixels from `start` on lie before and after a line of `length`."""
    return max(-start, 0), max(start + size - length, 0)
