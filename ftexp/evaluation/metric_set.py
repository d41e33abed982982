"""The metrics of one evaluation of one model. Imported only if a run has metrics besides loss and accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import ftexp.evaluation.metrics  # noqa: F401 - registers the built-in metrics
from ftexp.evaluation.metric_registry import MetricContext, metric_builder
from ftexp.evaluation.predictions import Predictions


class MetricSet:
    """The metrics in `names`, updated with each batch."""

    def __init__(
        self,
        names: Sequence[str],
        task: str,
        class_names: Sequence[str],
        device: torch.device,
        target_std: Sequence[float] | None = None,
    ) -> None:
        self._predictions = Predictions(task)
        context = MetricContext(task, len(class_names), class_names, device, self._predictions, target_std)
        self._metrics = {name: metric_builder(name)(context) for name in names}
        for metric in self._metrics.values():
            if isinstance(metric, torch.nn.Module):  # torchmetrics' metrics are modules
                metric.to(device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: logits float32 [rows, classes], targets as for losses."""
        self._predictions.add(logits, targets)
        for metric in self._metrics.values():
            metric.update(logits, targets)

    @torch.inference_mode()
    def compute(self) -> dict[str, float]:
        """Return each metric over all ranks; collective."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns if this rank has no samples
            return {name: float(metric.compute()) for name, metric in self._metrics.items()}
