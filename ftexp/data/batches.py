"""Batches, as a feed passes them to the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ftexp.data.order import Int64s


@dataclass(frozen=True)
class MicroBatch:
    """Part of a rank's share, for one forward and backward pass."""

    # float32, normalised, [rows, channels, image_size, image_size]; with augment.splits, views of a row are adjacent
    images: Tensor
    labels: Tensor  # int64 [rows], or float32 [rows, num_classes]: see `ToTensors.targets`
    weights: Tensor  # float32 [rows]; weight * loss, summed over micro-batches and averaged over ranks: the global mean
    positions: Int64s  # [rows]
    pairs: Int64s | None = None  # [2, pairs]: rows to mix with each other
    num_partners: int = 0  # rows at the end that are present only to be mixed into others
    targets: Tensor | None = None  # float32 [rows, num_classes], if samples were mixed


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch, which covers the positions [start, end)."""

    start: int
    end: int
    micro_batches: list[MicroBatch]
    positions: Int64s  # positions of this rank's share, [rows]
    samples: Int64s  # samples at these positions, [rows]
