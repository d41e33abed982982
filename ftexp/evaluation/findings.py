"""The findings of an evaluation, besides loss and accuracy, for each `data.task`."""

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
    """Collects the batches of one rank, and reports on those of all ranks."""

    def add(self, images: Tensor, targets: Tensor, outputs: Tensor) -> None:
        """Count a batch: normalised images, targets, and the model's outputs for them."""
        ...

    def report(self, info: DataInfo) -> dict[str, Any]:
        """Return the content of `evaluation_<split>.json`, on rank 0; collective."""
        ...


def findings_of(info: DataInfo, to_pixels: Callable[[Tensor], UInt8s], threshold: Any = None) -> Findings:
    """Return the findings for the task of `info`.

    Args:
        info: info of the data.
        to_pixels: converts normalised images back to uint8 rows.
        threshold: for multi_label: a number for all classes, or a list with one per class; None: 0.5.
    """
    if info.task == MULTI_LABEL:
        thresholds = thresholds_of("threshold", threshold, info.num_classes)
        return SetFindings(info.num_classes, thresholds, to_pixels)
    if info.task == REGRESSION:
        return NumberFindings()
    return ClassFindings(info.num_classes, to_pixels)
