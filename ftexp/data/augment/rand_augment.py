"""RandAugment, by timm's own functions, image by image. What happens to a sample depends on (seed, position) only.

timm draws from Python's and numpy's global generators. Those are the training thread's, and a feed may run on another:
so this works with a copy of timm's module that has generators of its own. They are drawn from as the global ones are.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ftexp.data.order import Int64s, derive_seed
from ftexp.data.sources.arrays import UInt8s

_MODULE = "timm.data.auto_augment"
_STREAM = 0x72616E64  # keeps these draws apart from other uses of the run's seed
_GREY = 0.5  # what moves in at the edges, where the data's mean isn't given


class RandAugment:
    """Called with uint8 images [rows, height, width, channels], of one or three channels."""

    def __init__(self, words: str, seed: int, mean: Sequence[float]) -> None:
        self._seed = derive_seed(seed, _STREAM)
        self._random, self._numpy_random = random.Random(), np.random.RandomState()
        module = _copy_of_timms()
        module.random, module.np, module.ImageOps = self._random, _Numpy(self._numpy_random), _ImageOps()
        fill = tuple(min(255, round(255 * value)) for value in mean or (_GREY,))  # as timm's create_transform has it
        self._transform = module.rand_augment_transform(words, {"img_mean": fill if len(fill) > 1 else fill[0]})

    def __call__(self, rows: UInt8s, positions: Int64s) -> UInt8s:
        """A changed copy; row i as `positions[i]` says."""
        changed = np.empty_like(rows)
        for number, position in enumerate(positions.tolist()):
            seed = derive_seed(self._seed, position)
            self._random.seed(seed)
            self._numpy_random.seed(seed % 2**32)
            image = Image.fromarray(rows[number, :, :, 0] if rows.shape[3] == 1 else rows[number])
            changed[number] = np.asarray(self._transform(image)).reshape(rows.shape[1:])
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
    spec = importlib.util.find_spec(_MODULE)
    assert spec is not None, "timm is a dependency of ftexp"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
