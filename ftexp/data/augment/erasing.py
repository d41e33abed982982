"""Random erasing, by timm's own class, on normalised images. The draws depend on (seed, position) only."""

from __future__ import annotations

import random

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from ftexp.config.schema import AugmentConfig
from ftexp.data.order import Int64s, derive_seed, derive_seeds

_STREAM = 0x657261  # keeps these draws apart from other uses of the run's seed


class Erasing:
    """Erases rectangles, image by image. Draws from Python's and torch's global generators, which it seeds."""

    def __init__(self, config: AugmentConfig, seed: int, device: torch.device) -> None:
        self._seed = derive_seed(seed, _STREAM)
        self._device = device
        self._probability = config.erase_prob
        self._draws_pixels = config.erase_mode != "const"
        self._erase = RandomErasing(
            config.erase_prob, mode=config.erase_mode, max_count=config.erase_count, device=device
        )

    def __call__(self, images: Tensor, positions: Int64s) -> Tensor:
        """Erase in place in `images`, [rows, channels, height, width]; the draws of row i depend on `positions[i]`."""
        for row, seed in enumerate((derive_seeds(self._seed, positions) % np.uint64(2**63)).tolist()):
            random.seed(seed)
            if random.random() > self._probability:  # timm's decision; avoids seeding torch for most images
                continue
            random.seed(seed)
            if self._draws_pixels:
                torch.default_generator.manual_seed(seed)
                if self._device.type == "cuda":
                    torch.cuda.manual_seed(seed)
            self._erase(images[row])
        return images
