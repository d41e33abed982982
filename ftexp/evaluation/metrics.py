"""The built-in metrics, by torchmetrics. Imported only if a run has one of them: importing torchmetrics takes seconds.

Each metric is the same for any number of workers and any batch size. It either sums integers, or is computed from all
predictions, gathered in the order of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassStatScores
from torchmetrics.functional.classification import binary_precision_recall_curve, binary_roc

from ftexp.evaluation.metric_registry import MetricContext, register_metric
from ftexp.evaluation.numbers import errors
from ftexp.evaluation.predictions import Predictions

_BINS = 15  # bins of confidence, as in Guo et al., On Calibration of Modern Neural Networks, 2017, and torchmetrics
_UNIT = 2.0**24  # confidences are summed as integer multiples of 2**-24: see `ftexp.evaluation.meter`


@register_metric("top5")
def _top5(context: MetricContext) -> Metric:
    """Return the share of samples whose class is among the five with the largest logits."""
    return MulticlassAccuracy(context.num_classes, top_k=5, average="micro", validate_args=False)


@register_metric("f1_macro")
def _f1_macro(context: MetricContext) -> Metric:
    """Return the mean F1 of the classes that occur as labels or predictions."""
    return MulticlassF1Score(context.num_classes, average="macro", validate_args=False)


@register_metric("balanced_accuracy")
class _BalancedAccuracy(MulticlassStatScores):
    """The mean recall of the classes that have samples, as in scikit-learn.

    torchmetrics' own macro accuracy counts a class without samples as 0 if it is predicted.
    """

    def __init__(self, context: MetricContext) -> None:
        super().__init__(context.num_classes, average="none", validate_args=False)

    def compute(self) -> Tensor:
        """Return the metric over all counted samples."""
        assert isinstance(self.tp, Tensor)
        assert isinstance(self.fn, Tensor)
        right, samples = self.tp.double(), (self.tp + self.fn).double()
        return (right / samples)[samples > 0].mean()


@register_metric("calibration_error")
class _CalibrationError(Metric):
    """The expected calibration error: |accuracy - confidence| in 15 bins of confidence, averaged over samples."""

    full_state_update = False

    def __init__(self, context: MetricContext) -> None:
        super().__init__()
        self._edges = torch.linspace(0, 1, _BINS + 1, device=context.device)
        # per bin: samples, right predictions, sum of confidences in units, samples whose logits aren't finite. The last
        # bin is for a confidence of 1, as in torchmetrics
        self.add_state("sums", torch.zeros(4, _BINS + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        confidences, predictions = logits.softmax(1).max(1)
        bins = torch.bucketize(confidences, self._edges, right=True) - 1
        units = (confidences.nan_to_num().double() * _UNIT).round().long()
        right, lost = (predictions == targets).long(), confidences.isnan().long()
        self.sums.index_add_(1, bins, torch.stack([torch.ones_like(units), right, units, lost]))

    def compute(self) -> Tensor:
        """Return the metric over all counted samples."""
        samples, right, units, lost = self.sums.double()
        error = (right - units / _UNIT).abs().sum() / samples.sum()
        return torch.where(lost.sum() > 0, torch.nan, error)


class _MeanOfClasses:
    """The mean of `measure` for each class against the rest, over classes with positive and negative samples.

    It is computed exactly, from all predictions. torchmetrics' linear thresholds, which save memory, don't work for
    1,000 classes, where nearly all probabilities are below the first threshold.
    """

    def __init__(self, predictions: Predictions, measure: Callable[[Tensor, Tensor], float]) -> None:
        self._predictions, self._measure = predictions.keep(), measure

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Do nothing: the predictions are kept for all metrics at once."""

    def compute(self) -> float:
        """Return the metric over all predictions; collective."""
        values = [value for value in self._predictions.by_class(self._of_class) if value is not None]
        return math.fsum(values) / len(values) if values else math.nan

    def _of_class(self, probabilities: Tensor, holds: Tensor) -> float | None:
        if bool(holds.all()) or not bool(holds.any()):
            return None
        return self._measure(probabilities, holds.long()) if bool(probabilities.isfinite().all()) else math.nan


@register_metric("auroc")
def _auroc(context: MetricContext) -> _MeanOfClasses:
    """Return the area under the ROC curve."""
    return _MeanOfClasses(context.predictions, _area_under_roc)


@register_metric("average_precision")
def _average_precision(context: MetricContext) -> _MeanOfClasses:
    """Return the area under the precision-recall curve, by steps."""
    return _MeanOfClasses(context.predictions, _step_area)


# sums by numpy, since torch's sum depends on the number of threads
def _area_under_roc(probabilities: Tensor, holds: Tensor) -> float:
    false_rate, true_rate, _ = binary_roc(probabilities, holds, validate_args=False)
    return float(np.trapezoid(true_rate.double().numpy(), false_rate.double().numpy()))


def _step_area(probabilities: Tensor, holds: Tensor) -> float:
    precision, recall, _ = binary_precision_recall_curve(probabilities, holds, validate_args=False)
    return -float(np.sum(np.diff(recall.double().numpy()) * precision.double().numpy()[:-1]))


class _OfTargets:
    """The mean over targets of one entry of `ftexp.evaluation.numbers.errors`, in the units of the data."""

    def __init__(self, context: MetricContext, key: str) -> None:
        self._predictions, self._key = context.predictions.keep(), key
        self._std = 1.0 if context.target_std is None else np.array(context.target_std)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Do nothing: the predictions are kept for all metrics at once."""

    def compute(self) -> float:
        """Return the metric over all predictions; collective. NaN if it is not defined for any target."""
        outputs, targets = (values.double().numpy() * self._std for values in self._predictions.pairs())
        found = [errors(*pair)[self._key] for pair in zip(outputs.T, targets.T, strict=True)]
        known = [value for value in found if value is not None]
        return math.fsum(known) / len(known) if known else math.nan


@register_metric("mae")
def _mae(context: MetricContext) -> _OfTargets:
    """Return the mean absolute error."""
    return _OfTargets(context, "mae")


@register_metric("mse")
def _mse(context: MetricContext) -> _OfTargets:
    """Return the mean squared error."""
    return _OfTargets(context, "mse")


@register_metric("r2")
def _r2(context: MetricContext) -> _OfTargets:
    """Return the coefficient of determination."""
    return _OfTargets(context, "r2")
