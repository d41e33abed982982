"""All predictions of a split, kept for metrics that are not sums over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL

T = TypeVar("T")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    SINGLE_LABEL: lambda logits: logits.softmax(1),
    MULTI_LABEL: torch.sigmoid,
    REGRESSION: lambda outputs: outputs,
}
_COLUMNS = 64  # number of classes for which one rank gathers all samples at a time


class Predictions:
    """Probabilities of this rank's samples, float32 on the CPU, stored once for all metrics.

    Memory: 4 bytes per sample and class, over all ranks together (50,000 samples of 1,000 classes: 200 MB). While a
    metric is computed, each rank also holds 64 classes of all samples (13 MB).
    """

    def __init__(self, task: str = SINGLE_LABEL) -> None:
        self._task, self._keeps = task, False
        self._probabilities: list[Tensor] = []
        self._targets: list[Tensor] = []

    def keep(self) -> Predictions:
        """Start keeping predictions."""
        self._keeps = True
        return self

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Keep a batch if a metric needs it: logits float32 [rows, classes], targets as for losses.

        Probabilities are computed by softmax; for multi_label by sigmoid; for regression, outputs are kept unchanged.
        """
        if self._keeps:
            self._probabilities.append(_ACTIVATIONS[self._task](logits).cpu())
            self._targets.append((targets > 0 if self._task == MULTI_LABEL else targets).cpu())

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return all ranks' outputs and targets, in the order of the samples; collective."""
        parts = _gathered_everywhere((self._probabilities, self._targets))
        outputs, targets = ([batch for part in parts for batch in part[which]] for which in (0, 1))
        return torch.cat(outputs), torch.cat(targets)

    def by_class(self, measure: Callable[[Tensor, Tensor], T]) -> list[T]:
        """Return `measure(probabilities, holds)` for each class over all ranks' samples, in their order; collective.

        measure: its arguments are float32 [samples] and bool [samples]: whether each sample has the class. The classes
        are distributed over ranks.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        held = torch.cat(self._probabilities) if self._probabilities else None
        # a rank without samples doesn't know the number of classes
        num_classes = max(_gathered_everywhere(0 if held is None else held.shape[1]))
        if not num_classes:  # the split is empty
            return []
        targets = torch.cat([part for parts in _gathered_everywhere(self._targets) for part in parts])
        measured: dict[int, T] = {}
        for number, first in enumerate(range(0, num_classes, _COLUMNS)):
            home = number % world_size
            columns = _gathered(None if held is None else held[:, first : first + _COLUMNS].clone(), home)
            if rank == home:
                whole = torch.cat([part for part in columns if part is not None])
                for index, column in enumerate(whole.T):
                    measured[first + index] = measure(column.contiguous(), _holds(targets, first + index))
        together = {label: value for part in _gathered_everywhere(measured) for label, value in part.items()}
        return [together[label] for label in range(num_classes)]


def _holds(targets: Tensor, label: int) -> Tensor:
    return targets == label if targets.ndim == 1 else targets[:, label]


def _gathered_everywhere(value: Any) -> list[Any]:
    """Return all ranks' values, on all ranks; collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _gathered(value: Any, home: int) -> list[Any]:
    """Return all ranks' values on rank `home`, and a list of None on other ranks; collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, values if dist.get_rank() == home else None, dst=home)
    return values
