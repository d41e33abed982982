"""Augmentation of whole batches before they are normalised. What happens to a sample depends on (seed, position) only.

Shift, flip and brightness work on tensors; `augment.rand_augment` goes image by image. What is done to pictures where
they are decoded comes before, in `ftexp.data.augment.picture`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ftexp.config.schema import AugmentConfig
from ftexp.data.augment.auto_augment import RandAugment
from ftexp.data.order import Int64s, derive_seed, uniforms
from ftexp.data.sources.arrays import UInt8s

_STREAM = 0x617567  # keeps these draws apart from other uses of the run's seed


class Augment:
    """Shift, flip and brightness. Called with uint8-valued floats in 0..1, [batch, channels, height, width].

    `mean` of the data's pixels, a value a channel, is what RandAugment has move in at the edges.
    """

    def __init__(self, config: AugmentConfig, seed: int, mean: Sequence[float] = ()) -> None:
        self._config = config
        self._seed = derive_seed(seed, _STREAM)
        self._rand_augment = RandAugment(config.rand_augment, seed, mean) if config.rand_augment else None

    @property
    def changes_tensors(self) -> bool:
        """Whether calling it changes anything."""
        config = self._config
        return config.pad_px > 0 or config.brightness > 0 or (config.hflip > 0 and not config.changes_pictures)

    def pixels(self, rows: UInt8s, positions: Int64s) -> UInt8s:
        """Apply RandAugment, if set, to uint8 rows [batch, height, width, channels]; comes before all else."""
        return rows if self._rand_augment is None else self._rand_augment(rows, positions)

    def __call__(self, images: Tensor, positions: Int64s) -> Tensor:
        """Return augmented images; row i is changed by the random stream of `positions[i]`."""
        config = self._config
        if config.pad_px:
            images = self._shift(images, positions, config.pad_px)
        if config.hflip and not config.changes_pictures:  # there it is done with them
            flipped = self._draw(positions, 2) < config.hflip
            images = torch.where(flipped.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)
        if config.brightness:
            factor = 1 + config.brightness * (2 * self._draw(positions, 3) - 1)
            images = (images * factor.to(images).view(-1, 1, 1, 1)).clamp(0, 1)
        return images

    def _draw(self, positions: Int64s, draw: int) -> Tensor:
        return torch.from_numpy(uniforms(self._seed, positions, draw))

    def _shift(self, images: Tensor, positions: Int64s, max_shift: int) -> Tensor:
        """Crop a window of the same size from the zero-padded image: the usual random crop."""
        batch, channels, height, width = images.shape
        down, right = ((self._draw(positions, draw) * (2 * max_shift + 1)).long().to(images.device) for draw in (0, 1))
        padded = torch.nn.functional.pad(images, (max_shift, max_shift, max_shift, max_shift))
        rows = down.view(-1, 1) + torch.arange(height, device=images.device)
        columns = right.view(-1, 1) + torch.arange(width, device=images.device)
        index = (rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)).view(batch, 1, -1)
        return padded.flatten(2).gather(2, index.expand(-1, channels, -1)).view(images.shape)
