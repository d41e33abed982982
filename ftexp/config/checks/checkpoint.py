"""Checks of the checkpoint settings and of the metric that ranks checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.metrics import better_of, logged_metrics, unlogged
from ftexp.config.schema import BESIDE, DDP, Config


def check_checkpoint(config: Config) -> Iterator[str]:
    """Check the content and format of checkpoints and the metric that ranks them."""
    names = config.checkpoint.extra_state
    if "progress" not in names:
        yield f"checkpoint.extra_state={names} must hold progress: a run can't resume without its position"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"checkpoint.extra_state names {name} more than once"
    if config.train.precision == "fp16" and "scaler" not in names:
        yield f"checkpoint.extra_state={names} must hold scaler, since train.precision=fp16 scales the loss"
    if config.checkpoint.format == "sharded" and config.parallel.kind == DDP:
        yield (
            "checkpoint.format=sharded with parallel=ddp: no parameter is sharded; set parallel=fsdp or "
            "checkpoint.format=auto"
        )
    metric, order = config.checkpoint.checkpoint_score_attribute, config.checkpoint.checkpoint_score_order
    key, logged = "checkpoint.checkpoint_score_attribute", logged_metrics(config)
    if metric not in logged:
        yield unlogged(key, metric, [name for name in logged if not name.startswith("test_")])
    elif metric.startswith("test_"):
        yield f"{key}={metric} is measured only once, at the end of the run: choose val_{metric.removeprefix('test_')}"
    elif metric.startswith("train_") and config.train.eval == BESIDE:
        yield f"{key}={metric} is not measured by train.eval=beside: choose a val_ metric"
    elif (better := better_of(metric)) not in (None, order):
        order_key = f"checkpoint.checkpoint_score_order={order}"
        yield f"{key}={metric} is best at its {better}imum, but {order_key}: set it to {better}"
