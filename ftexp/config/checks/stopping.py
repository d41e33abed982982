"""Checks of early stopping and hooks."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.metrics import better_of, logged_metrics, unlogged
from ftexp.config.schema import BESIDE, Config, StoppingConfig


def check_stopping(config: Config) -> Iterator[str]:
    """Check the metric that stops a run, its direction and its patience."""
    stopping, epochs = config.stopping, config.train.epochs
    metric, logged = stopping.metric, logged_metrics(config)
    if metric is None:
        defaults = StoppingConfig()
        for name in ("mode", "patience_epochs", "min_delta"):
            if (value := getattr(stopping, name)) != getattr(defaults, name):
                yield f"stopping.{name}={value} needs stopping.metric: set stopping.metric, or remove it"
        return
    key = f"stopping.metric={metric}"
    if metric not in logged:
        yield unlogged("stopping.metric", metric, [name for name in logged if not name.startswith("test_")])
    elif metric.startswith("test_"):
        yield f"{key} is measured only once, at the end of the run: choose val_{metric.removeprefix('test_')}"
    elif metric.endswith("_ema") and config.ema.decay is None:
        yield f"{key} is a metric of the EMA: set ema.decay"
    elif metric.startswith("train_") and config.train.eval == BESIDE:
        yield f"{key} is not measured by train.eval=beside: choose a val_ metric"
    elif stopping.mode is not None and (better := better_of(metric)) not in (None, stopping.mode):
        yield f"{key} is best at its {better}imum, but stopping.mode={stopping.mode}: set it to {better} or null"
    if stopping.patience_epochs >= epochs:
        yield (
            f"stopping.patience_epochs={stopping.patience_epochs} must be below train.epochs={epochs}: otherwise the "
            "run never stops early"
        )


def check_hooks(config: Config) -> Iterator[str]:
    """Check that a plug-in is imported if hooks are named."""
    if config.hooks and not config.plugins:
        yield f"hooks names {', '.join(config.hooks)}, but no plug-in is imported: add plugins=[...]"
