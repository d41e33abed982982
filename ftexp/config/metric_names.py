"""The metrics that are built in, by name: which way each is better, and which tasks it is for."""

from __future__ import annotations

from dataclasses import dataclass

SINGLE_LABEL = "single_label"  # each sample is of one class
ALWAYS_LOGGED = ("loss", "accuracy")  # of every evaluation, whatever train.metrics names


@dataclass(frozen=True)
class MetricKind:
    """What is known of a metric before it is built."""

    better: str = "max"  # max, or min
    tasks: tuple[str, ...] = (SINGLE_LABEL,)


METRICS = {
    "top5": MetricKind(),
    "f1_macro": MetricKind(),
    "balanced_accuracy": MetricKind(),
    "auroc": MetricKind(),
    "average_precision": MetricKind(),
    "calibration_error": MetricKind(better="min"),
}
