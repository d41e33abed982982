"""Progressive resizing: smaller images early in training, to save time. The size depends only on the step.

The schedule is from MosaicML's Composer (composer/algorithms/progressive_resizing).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ftexp.config.schema import ResizingConfig


class Resizing:
    """Scales a batch to the image size of its step. Evaluation uses images of full size."""

    def __init__(self, config: ResizingConfig, full_size: int, total_positions: int) -> None:
        """full_size: in pixels. total_positions: of all epochs, also if train.max_steps ends the run earlier."""
        self._config, self._full_size, self._total_positions = config, full_size, total_positions

    def size_at(self, position: int) -> int:
        """Return the image size in pixels of the global batch that starts at `position`."""
        return size_at(self._config, self._full_size, position / self._total_positions)

    def __call__(self, images: Tensor, position: int) -> Tensor:
        """Return normalised images, [rows, channels, height, width], at the size of the batch at `position`."""
        size = self.size_at(position)
        if images.shape[-1] == size:
            return images
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def size_at(config: ResizingConfig, full_size: int, elapsed: float) -> int:
    """Return the image size in pixels after the share `elapsed`, 0 to 1, of training."""
    if config.initial_scale is None:
        return full_size
    ramp = 1 - config.finetune_fraction - config.delay_fraction
    since = elapsed - config.delay_fraction
    grown = min(max(since / ramp, 0.0), 1.0) if ramp > 0 else float(since >= 0)
    scale = config.initial_scale + (1 - config.initial_scale) * grown
    if grown == 1.0:
        return full_size
    size = round(full_size * scale / config.size_increment) * config.size_increment
    return min(max(size, config.size_increment), full_size)


def sizes(config: ResizingConfig, full_size: int) -> list[int]:
    """Return all image sizes that a run may train on, in ascending order."""
    steps = 4 * full_size  # fine enough to find every size
    return sorted({size_at(config, full_size, step / steps) for step in range(steps + 1)})
