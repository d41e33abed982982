"""The evaluation loss of each `data.task`, and the criterion for a right prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ftexp.evaluation.meter import means

_EVEN = 0.5  # a mixed sample has the classes whose targets are above this


@dataclass(frozen=True)
class Task:
    """Functions of (outputs float32 [rows, num_classes], targets from `ToTensors.targets`) -> [rows]."""

    losses: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], Tensor]  # bool


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _right_class(logits: Tensor, targets: Tensor) -> Tensor:
    """Return whether the most likely class is the right one; for a mixed sample, the class with the largest share."""
    return logits.argmax(1) == (targets if targets.ndim == 1 else targets.argmax(1))


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy over classes."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def _exact_match(logits: Tensor, targets: Tensor) -> Tensor:
    """Return whether the classes with a probability above 0.5 are exactly the sample's classes."""
    return ((logits > 0) == (targets > _EVEN)).all(1)


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error over targets."""
    return (outputs - targets).square().mean(1)


def _never(outputs: Tensor, _: Tensor) -> Tensor:
    """Return False for every sample: predicted numbers are neither right nor wrong."""
    return outputs.new_zeros(len(outputs)).bool()


def named_means(split: str, totals: list[int], task: str, suffix: str = "") -> dict[str, float]:
    """Return `<split>_loss<suffix>`, and accuracy except for regression, from a result of `Meter.totals`."""
    loss, accuracy = means(totals)
    values = {f"{split}_loss{suffix}": loss}
    return values if task == REGRESSION else {**values, f"{split}_accuracy{suffix}": accuracy}


TASKS = {
    SINGLE_LABEL: Task(_cross_entropy, _right_class),
    MULTI_LABEL: Task(_binary_cross_entropy, _exact_match),
    REGRESSION: Task(_squared_error, _never),
}
