"""Augmentation of batches before normalisation. The draws of a sample depend on (seed, position) only.

Shift, flip and brightness work on tensors, `augment.rand_augment` on single images. `ftexp.data.augment.picture`, which
augments pictures during decoding, is applied before.
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
    """Shift, flip and brightness of images [batch, channels, height, width] with values in 0..1.

    mean: mean of the data's pixels per channel, with which RandAugment fills the edges.
    """

    def __init__(self, config: AugmentConfig, seed: int, mean: Sequence[float] = ()) -> None:
        self._config = config
        self._seed = derive_seed(seed, _STREAM)
        self._rand_augment = RandAugment(config.rand_augment, seed, mean) if config.rand_augment else None

    @property
    def changes_tensors(self) -> bool:
        """Whether a call changes anything."""
        config = self._config
        return config.pad_px > 0 or config.brightness > 0 or (config.hflip > 0 and not config.changes_pictures)

    def pixels(self, rows: UInt8s, positions: Int64s) -> UInt8s:
        """Apply RandAugment, if configured, to uint8 rows [batch, height, width, channels]; call this first."""
        return rows if self._rand_augment is None else self._rand_augment(rows, positions)

    def __call__(self, images: Tensor, positions: Int64s) -> Tensor:
        """Return augmented images; row i uses the random stream of `positions[i]`."""
        config = self._config
        if config.pad_px:
            images = self._shift(images, positions, config.pad_px)
        if config.hflip and not config.changes_pictures:  # else PictureAugment flips
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
