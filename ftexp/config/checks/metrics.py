"""Checks of metrics, and the names of a run's logged metrics."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.wording import unregistered
from ftexp.config.metric_names import ALWAYS_LOGGED, METRICS
from ftexp.config.schema import REGRESSION, Config
from ftexp.registry import did_you_mean


def check_metrics(config: Config) -> Iterator[str]:
    """Check the names in train.metrics; metrics of plug-ins are checked after their import."""
    names = config.train.metrics
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"train.metrics names {name} more than once"
    for name in names:
        if name in ALWAYS_LOGGED:
            yield f"train.metrics names {name}, which is always logged: remove it"
        elif name not in METRICS and not config.plugins:
            yield unregistered("train.metrics", name, METRICS)
        elif name in METRICS and config.data.task not in METRICS[name].tasks:
            fitting = ", ".join(other for other, kind in METRICS.items() if config.data.task in kind.tasks)
            yield (
                f"train.metrics names {name}, which is not a metric of data.task={config.data.task}: choose from "
                f"{fitting}"
            )


def logged_metrics(config: Config) -> list[str]:
    """Return the names of all logged metrics; those of the EMA come last."""
    always = tuple(name for name in ALWAYS_LOGGED if name == "loss" or config.data.task != REGRESSION)
    own = [f"{split}_{name}" for split in ("val", "test") for name in (*always, *config.train.metrics)]
    return [*(f"train_{name}" for name in always), *own, *(f"{name}_ema" for name in own)]


def unlogged(key: str, metric: str, logged: list[str]) -> str:
    """Return the message for a metric that is not in `logged`."""
    name = name_of(metric)
    if name in METRICS and metric.startswith(("val_", "test_")):
        return f"{key}={metric} is only logged with train.metrics=[{name}]: add {name} to train.metrics"
    return f"{key}={metric} is not a logged metric.{did_you_mean(metric, logged)} Metrics: {', '.join(logged)}"


def better_of(logged: str) -> str | None:
    """Return "max" or "min", whichever is better for a logged metric; None for a metric of a plug-in."""
    name = name_of(logged)
    if name in ALWAYS_LOGGED:
        return "min" if name == "loss" else "max"
    return METRICS[name].better if name in METRICS else None


def name_of(logged: str) -> str:
    """Return a logged metric's name without its split and without `_ema`."""
    return logged.partition("_")[2].removesuffix("_ema")
