"""Mixup and cutmix, by timm's own class. Mixing does not depend on the number of workers or micro-batches.

Partners are neighbours in the global batch: its positions 0 and 1, 2 and 3, and so on. They are random samples, since
the order is shuffled. If a share starts or ends between two partners, it includes the missing one. Draws are seeded
by (seed, position). The position is the start of the global batch if the batch is mixed as a whole, or the first
position of a pair if each pair has its own draws.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch import Tensor

from ftexp.config.schema import AugmentConfig
from ftexp.data.batches import MicroBatch
from ftexp.data.order import Int64s, derive_seed

Float32s = npt.NDArray[np.float32]

_STREAM = 0x6D6978  # keeps these draws apart from other uses of the run's seed


@dataclass(frozen=True)
class _Pairs:
    """Images on a CPU and the rows of partners, with the interface that timm's Mixup needs."""

    images: Tensor
    first: Int64s  # row of the first partner of each pair
    second: Int64s  # row of the second partner

    def __len__(self) -> int:
        return len(self.first) + len(self.second)


class _InPlaceMixup(Mixup):  # type: ignore[misc]
    """timm's Mixup, bitwise identical; `mode=batch` mixes `_Pairs` in place, in a tenth of the time on a CPU."""

    def _mix_batch(self, x: Tensor | _Pairs) -> float:
        if not isinstance(x, _Pairs):
            whole: float = super()._mix_batch(x)
            return whole
        lam, use_cutmix = self._params_per_batch()
        images = x.images.numpy()
        if lam != 1 and use_cutmix:
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(images.shape, lam)
            for one, other in zip(x.first, x.second, strict=True):
                _exchange(images[one, :, top:bottom, left:right], images[other, :, top:bottom, left:right])
        elif lam != 1:
            for one, other in zip(x.first, x.second, strict=True):
                for plane, partner in zip(images[one], images[other], strict=True):
                    _blend(plane, partner, np.float32(lam), np.float32(1 - lam))
        return float(lam)


def _exchange(one: Float32s, other: Float32s) -> None:
    kept = one.copy()
    one[:] = other
    other[:] = kept


def _blend(one: Float32s, other: Float32s, lam: np.float32, rest: np.float32) -> None:
    """Blend a plane and its partner in place; both stay in a core's cache."""
    from_one, from_other = one * rest, other * rest
    np.multiply(one, lam, out=one)
    np.multiply(other, lam, out=other)
    np.add(one, from_other, out=one)
    np.add(other, from_one, out=other)


class Mixing:
    """Mixes pairs of samples and their labels. Seeds numpy's global generator and draws from it.

    A global batch that starts at position `end` or later isn't mixed, but its targets are still smoothed, as in timm.
    """

    def __init__(
        self,
        config: AugmentConfig,
        num_classes: int,
        label_smoothing: float,
        seed: int,
        end: int | None = None,
        has_vectors: bool = False,
    ) -> None:
        """has_vectors: whether labels are float32 [rows, num_classes]: 0 and 1, or numbers."""
        self._end = end
        self._seed = derive_seed(seed, _STREAM)
        self._whole = config.mix_mode == "batch"
        self._mixup = _InPlaceMixup(
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            prob=config.mix_prob,
            switch_prob=config.mix_switch_prob,
            mode=config.mix_mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
            multi_label=has_vectors,
        )

    def __call__(self, batch: MicroBatch, start: int) -> MicroBatch:
        """Return the mixed batch, with soft targets and without the rows of partners.

        start: position at which the global batch starts.
        """
        assert batch.pairs is not None, "made by a plan in pairs"
        kept = len(batch.labels) - batch.num_partners
        targets = self._unmixed(batch.labels)
        images = batch.images
        for rows, position in self._together(batch, start):
            index = torch.from_numpy(rows).to(images.device)
            np.random.seed(derive_seed(self._seed, position) % 2**32)
            if self._whole and images.device.type == "cpu":
                half = len(rows) // 2
                pairs = _Pairs(images, rows[:half], rows[half:][::-1])
                _, targets[index] = self._mixup(pairs, batch.labels[index])
            else:
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
        """Return (rows, position for the seed) for each call of timm's Mixup.

        timm's partner of row i is row i counted from the end.
        """
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
        """Return the targets of samples without a partner: as in timm, those of a sample mixed with itself."""
        smoothing, classes = self._mixup.label_smoothing, self._mixup.num_classes
        if self._mixup.multi_label:
            smoothed: Tensor = labels * (1.0 - smoothing) + 0.5 * smoothing
            return smoothed
        off = smoothing / classes
        targets = torch.full((len(labels), classes), off, device=labels.device)
        return targets.scatter_(1, labels.view(-1, 1), 1.0 - smoothing + off)
