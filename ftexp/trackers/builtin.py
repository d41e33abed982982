"""Registers the trackers that come with ftexp. Each tracker's package is imported only when a run uses it."""

from __future__ import annotations

import ftexp.trackers.mlflow
import ftexp.trackers.prometheus
import ftexp.trackers.tensorboard
import ftexp.trackers.wandb  # noqa: F401
