"""Early stopping: a hook that ends a run once a metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftexp.counting import counted
from ftexp.errors import ConfigError
from ftexp.evaluation.metric_registry import better_of
from ftexp.job.hook_registry import Hook, HookContext


def check_measured(metric: str | None, num_samples: Mapping[str, int]) -> None:
    """Raise ConfigError if a validation metric is to stop a run whose data have no validation split."""
    if metric is not None and metric.startswith("val_") and not num_samples["val"]:
        raise ConfigError(
            f"stopping.metric={metric} is never measured, since the data have no validation split: raise "
            "data.val_fraction, or choose a training metric"
        )


class EarlyStopping(Hook):
    """Requests a stop once `stopping.metric` hasn't improved for `stopping.patience_epochs` epochs.

    Only the first evaluation after each train.eval_every_epochs epochs is used. The extra evaluation at the end of a
    run is ignored, so that the run can resume with more epochs or steps as if it had not ended there.
    """

    def __init__(self, context: HookContext) -> None:
        super().__init__(context)
        stopping = context.config.stopping
        assert stopping.metric is not None, "or there is no early stopping"
        self._config, self._metric = stopping, stopping.metric
        self._every = context.config.train.eval_every_epochs
        self._sign = 1 if (stopping.mode or better_of(stopping.metric)) == "max" else -1
        self._best: float | None = None
        self._best_epoch = self._last_epoch = 0

    def after_evaluation(self, step: int, epoch: int) -> None:  # noqa: ARG002 - epochs are what counts
        """Compare the metric with its best."""
        value = self.context.progress.metrics.get(self._metric)
        # a training metric may not have been logged yet
        if value is None or epoch <= self._last_epoch or epoch % self._every:
            return
        self._last_epoch = epoch
        if math.isfinite(value) and self._improves(value):
            self._best, self._best_epoch = value, epoch
        elif epoch - self._best_epoch >= self._config.patience_epochs:
            best = "never finite" if self._best is None else f"{self._best:.4f} at epoch {self._best_epoch}"
            waited = epoch - self._best_epoch
            self.context.request_stop(f"{self._metric} has not improved for {counted(waited, 'epoch')} (best {best})")

    def _improves(self, value: float) -> bool:
        return self._best is None or self._sign * (value - self._best) > self._config.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return the metric's name, its best value, and the epochs of the best and of the last evaluation."""
        epochs = {"best_epoch": self._best_epoch, "last_epoch": self._last_epoch}
        return {"metric": self._metric, "best": self._best, **epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the best value, or start again if the metric has changed."""
        self._last_epoch = state["last_epoch"]
        if state["metric"] == self._metric:
            self._best, self._best_epoch = state["best"], state["best_epoch"]
        else:
            self._best_epoch = state["last_epoch"]
