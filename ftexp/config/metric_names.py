"""The built-in metrics by name: whether larger or smaller is better, and their tasks."""

from __future__ import annotations

from dataclasses import dataclass

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL

ALWAYS_LOGGED = ("loss", "accuracy")  # metrics of every evaluation, whatever train.metrics names


@dataclass(frozen=True)
class MetricKind:
    """Properties of a metric that are known before it is built."""

    better: str = "max"  # max or min
    tasks: tuple[str, ...] = (SINGLE_LABEL,)


METRICS = {
    "top5": MetricKind(),
    "f1_macro": MetricKind(),
    "balanced_accuracy": MetricKind(),
    "auroc": MetricKind(tasks=(SINGLE_LABEL, MULTI_LABEL)),
    "average_precision": MetricKind(tasks=(SINGLE_LABEL, MULTI_LABEL)),
    "calibration_error": MetricKind(better="min"),
    "mae": MetricKind(better="min", tasks=(REGRESSION,)),
    "mse": MetricKind(better="min", tasks=(REGRESSION,)),
    "r2": MetricKind(tasks=(REGRESSION,)),
}
