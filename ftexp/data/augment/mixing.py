"""Mixup and cutmix, by timm's own class. Which two samples are mixed, and how, never depends on the workers.

Partners are neighbours in the global batch: positions 0 and 1 of it, 2 and 3, and so on; the order is shuffled, so
that they are strangers all the same. A share that begins or ends between two partners takes the missing one along.
Draws are seeded by (seed, position): of the global batch's beginning where it is mixed as a whole, of the first of two
partners where each two draw for themselves. So any number of workers and micro-batches mix a global batch alike.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from ftexp.config.schema import AugmentConfig
from ftexp.data.batches import MicroBatch
from ftexp.data.order import Int64s, derive_seed

_STREAM = 0x6D6978  # keeps these draws apart from other uses of the run's seed


class Mixing:
    """Mixes pairs of samples, and their classes. Draws from numpy's global generator, which it seeds.

    A global batch that begins at position `end` or later isn't mixed, but has the same smoothed targets, as timm's.
    """

    def __init__(
        self, config: AugmentConfig, num_classes: int, label_smoothing: float, seed: int, end: int | None = None
    ) -> None:
        self._end = end
        self._seed = derive_seed(seed, _STREAM)
        self._whole = config.mix_mode == "batch"
        self._mixup = Mixup(
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            prob=config.mix_prob,
            switch_prob=config.mix_switch_prob,
            mode=config.mix_mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batch: MicroBatch, start: int) -> MicroBatch:
        """The batch mixed, with soft targets and without its partners' rows; the global batch begins at `start`."""
        assert batch.pairs is not None, "made by a plan in pairs"
        kept = len(batch.labels) - batch.num_partners
        targets = self._unmixed(batch.labels)
        images = batch.images
        for rows, position in self._together(batch, start):
            index = torch.from_numpy(rows).to(images.device)
            np.random.seed(derive_seed(self._seed, position) % 2**32)
            images[index], targets[index] = self._mixup(images[index], batch.labels[index])
        return dataclasses.replace(
            batch,
            images=images[:kept],
            labels=batch.labels[:kept],
            weights=batch.weights[:kept],
            positions=batch.positions[:kept],
            pairs=None,
            num_partners=0,
            targets=targets[:kept],
        )

    def _together(self, batch: MicroBatch, start: int) -> list[tuple[Int64s, int]]:
        """(rows, position that seeds) of what is mixed in one call. timm's partner of row i is row i from the end."""
        assert batch.pairs is not None
        if self._end is not None and start >= self._end:
            return []
        first, second = batch.pairs
        if not self._whole:
            return [
                (np.array(pair), int(batch.positions[pair[0]]))
                for pair in zip(first.tolist(), second.tolist(), strict=True)
            ]
        return [(np.concatenate([first, second[::-1]]), start)] if len(first) else []

    def _unmixed(self, labels: Tensor) -> Tensor:
        """Targets of samples without a partner: timm's, as if mixed with themselves."""
        smoothing, classes = self._mixup.label_smoothing, self._mixup.num_classes
        off = smoothing / classes
        targets = torch.full((len(labels), classes), off, device=labels.device)
        return targets.scatter_(1, labels.view(-1, 1), 1.0 - smoothing + off)
