"""Batches, as a feed passes them to the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ftexp.data.order import Int64s


@dataclass(frozen=True)
class MicroBatch:
    """Part of a rank's share, for one forward and backward pass."""

    # float32, normalised [rows, channels, image_size, image_size]; with augment.splits, views of a row come together
    images: Tensor
    labels: Tensor  # int64 [rows], or float32 [rows, num_classes]: see `ToTensors.targets`
    weights: Tensor  # float32 [rows]; summed over all ranks and micro-batches, weight times loss is the global mean
    positions: Int64s  # [rows]
    pairs: Int64s | None = None  # [2, pairs]: rows to be mixed with one another
    num_partners: int = 0  # rows at the end that are only there to be mixed into others
    targets: Tensor | None = None  # float32 [rows, num_classes], where samples were mixed


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch, which covers the positions [start, end)."""

    start: int
    end: int
    micro_batches: list[MicroBatch]
    positions: Int64s  # positions of the share of this rank, [rows]
    samples: Int64s  # at those positions, [rows]
