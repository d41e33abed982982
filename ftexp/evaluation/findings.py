"""The findings of an evaluation besides loss and accuracy, by `data.task`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ftexp.config.schema import MULTI_LABEL, REGRESSION
from ftexp.data.decoder import UInt8s
from ftexp.data.info import DataInfo
from ftexp.evaluation.label_sets import SetFindings, thresholds_of
from ftexp.evaluation.mistakes import ClassFindings
from ftexp.evaluation.numbers import NumberFindings


class Findings(Protocol):
    """Collects batches on one rank, and reports on all ranks'."""

    def add(self, images: Tensor, targets: Tensor, outputs: Tensor) -> None:
        """Count a batch: images and targets as evaluation has them, and what the model gave for them."""
        ...

    def report(self, info: DataInfo) -> dict[str, Any]:
        """Return what `evaluation_<split>.json` says, on rank 0; collective."""
        ...


def findings_of(info: DataInfo, to_pixels: Callable[[Tensor], UInt8s], threshold: Any = None) -> Findings:
    """Return what collects for the task of `info`.

    Args:
        info: of the data.
        to_pixels: turns images as the model gets them back into uint8 rows.
        threshold: of multi_label: one for all classes, or a list with one for each; None: 0.5.
    """
    if info.task == MULTI_LABEL:
        thresholds = thresholds_of("threshold", threshold, info.num_classes)
        return SetFindings(info.num_classes, thresholds, to_pixels)
    if info.task == REGRESSION:
        return NumberFindings()
    return ClassFindings(info.num_classes, to_pixels)
