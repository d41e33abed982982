"""How a picture becomes a square of the final size, as timm has it: all of it to evaluate, a random part to train.

Works on Pillow images of any size. Draws come from the generator that is given, in timm's order. torch isn't imported,
which tasks that decode would pay for; tests hold every function against timm's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_RANDOM = "random"
_TRIES = 10  # of a random box, before it is the largest one in the centre
_RKR_PROB = 0.5  # of a change of scale in rkrc and rkrr, and of one of the ratio


@dataclass(frozen=True)
class Fit:
    """How the whole picture is fitted into a square: `data.crop_pct`, `data.crop_mode` and `data.interpolation`."""

    size: int
    channels: int = 3
    crop_pct: float | None = None  # side of the square, as a share of the side that is scaled to; see `fitted`
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = ()  # per channel, of pixels scaled to 0..1; fills the border of crop_mode=border


def fitted(image: Image.Image, fit: Fit) -> Image.Image:
    """Scale and crop as timm's transforms_imagenet_eval does; without `crop_pct`, centred squares by ImageOps.fit.

    The latter cuts the largest square out and scales it, in one step, where timm scales first, to whole pixels.
    """
    resample, square = RESAMPLING[fit.interpolation], (fit.size, fit.size)
    if fit.crop_pct is None and fit.crop_mode == "center":
        return image if image.size == square else ImageOps.fit(image, square, resample)
    side = math.floor(fit.size / (fit.crop_pct or 1.0))
    width, height = image.size
    if fit.crop_mode == "squash":
        width, height = side, side
    elif fit.crop_mode == "border":
        ratio = max(width / side, height / side)
        width, height = max(1, round(width / ratio)), max(1, round(height / ratio))
    else:
        shorter = min(width, height)
        width, height = int(side * width / shorter), int(side * height / shorter)
    left, top = _centred(width, fit.size), _centred(height, fit.size)
    canvas = Image.new(image.mode, square, fill_color(fit.mean))
    canvas.paste(image.resize((width, height), resample), (-left, -top))
    return canvas


def fill_color(mean: Sequence[float]) -> int | tuple[int, ...]:
    """The mean of pixels in 0..1, a value a channel, as a colour of Pillow's; black without one."""
    values = tuple(min(255, round(255 * value)) for value in mean)
    return values if len(values) > 1 else sum(values)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of a picture, scaled to a square: timm's train_crop_mode rrc, rkrc or rkrr."""

    mode: str
    size: int
    scale: tuple[float, float]  # of the area, as a share of the picture's
    ratio: tuple[float, float]  # of width to height; rkrc, rkrr: what it is multiplied by
    interpolation: str  # bilinear, bicubic, or random for one of them

    def __call__(self, image: Image.Image, draws: random.Random) -> Image.Image:
        """Crop and scale."""
        if self.mode == "rrc":
            box = self.box(image.size, draws)
            return image.crop(box).resize((self.size, self.size), self._resampling(draws))
        size = self._scaled(image.size, draws)
        return self._placed(image.resize(size, self._resampling(draws)), draws)

    def box(self, size: tuple[int, int], draws: random.Random) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in a picture of this width and height, as RandomResizedCropAndInterpolation's."""
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
        """The width and height that a picture is scaled to in rkrc and rkrr, as ResizeKeepRatio's."""
        width, height = size
        shorter = min(height / self.size, width / self.size)
        down = across = 1.0
        if draws.random() < _RKR_PROB:
            down = across = 1.0 / math.sqrt(draws.uniform(*self.scale))
        if draws.random() < _RKR_PROB:
            stretch = math.sqrt(math.exp(draws.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]))))
            down, across = down / stretch, across * stretch
        return round(width * across / shorter), round(height * down / shorter)

    def _placed(self, image: Image.Image, draws: random.Random) -> Image.Image:
        """A square of it: rkrc's from the centre, rkrr's from anywhere; what lies outside mirrors what is inside."""
        if self.mode == "rkrc":
            top, left = _centred(image.height, self.size), _centred(image.width, self.size)
        else:
            top, left = (_anywhere(length - self.size, draws) for length in (image.height, image.width))
        rows, columns = _outside(top, image.height, self.size), _outside(left, image.width, self.size)
        if any((*rows, *columns)):
            pixels = np.asarray(image)
            image = Image.fromarray(np.pad(pixels, [rows, columns, (0, 0)][: pixels.ndim], mode="reflect"))
        left, top = max(left, 0), max(top, 0)
        return image.crop((left, top, left + self.size, top + self.size))


def _centred(length: int, size: int) -> int:
    """Where the middle `size` pixels of `length` begin; negative if that is shorter. timm rounds as this does."""
    return round((length - size) / 2) if length > size else -((size - length) // 2)


def _anywhere(margin: int, draws: random.Random) -> int:
    start = draws.randint(0, abs(margin))
    return start if margin > 0 else -start


def _outside(start: int, length: int, size: int) -> tuple[int, int]:
    """How many of `size` pixels from `start` on lie before and after a line of `length`."""
    return max(-start, 0), max(start + size - length, 0)
