"""Early stopping and hooks: the ways to end a run before its last step."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.metrics import better_of, logged_metrics, unlogged
from ftexp.config.schema import BESIDE, Config, StoppingConfig


def check_stopping(config: Config) -> Iterator[str]:
    """The metric that stops a run, its direction, and for how long it is waited for."""
    stopping, epochs = config.stopping, config.train.epochs
    metric, logged = stopping.metric, logged_metrics(config)
    if metric is None:
        defaults = StoppingConfig()
        for name in ("mode", "patience_epochs", "min_delta"):
            if (value := getattr(stopping, name)) != getattr(defaults, name):
                yield f"stopping.{name}={value} needs stopping.metric: set that too, or remove it"
        return
    key = f"stopping.metric={metric}"
    if metric not in logged:
        yield unlogged("stopping.metric", metric, [name for name in logged if not name.startswith("test_")])
    elif metric.startswith("test_"):
        yield f"{key} is measured once, at the end: choose val_{metric.removeprefix('test_')}"
    elif metric.endswith("_ema") and config.ema.decay is None:
        yield f"{key} is of the EMA: set ema.decay"
    elif metric.startswith("train_") and config.train.eval == BESIDE:
        yield f"{key} is not known for the step that train.eval=beside evaluates: choose a val_ metric"
    elif stopping.mode is not None and (better := better_of(metric)) not in (None, stopping.mode):
        yield f"{key} is best at its {better}imum, and stopping.mode={stopping.mode}: set that to {better}, or to null"
    if stopping.patience_epochs >= epochs:
        yield (
            f"stopping.patience_epochs={stopping.patience_epochs} must be below train.epochs={epochs}: the run would "
            "never be stopped early"
        )


def check_hooks(config: Config) -> Iterator[str]:
    """Hooks come from plug-ins alone."""
    if config.hooks and not config.plugins:
        yield f"hooks names {', '.join(config.hooks)}, and no plug-in is imported: add plugins=[...]"
