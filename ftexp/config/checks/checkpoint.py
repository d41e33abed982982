"""Checks of how a run is saved, and of the metric that ranks its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.schema import Config
from ftexp.registry import did_you_mean

LOGGED_METRICS = tuple(  # that a run writes
    f"{split}_{kind}{of}"
    for of in ("", "_ema")
    for split in ("train", "val", "test")
    for kind in ("loss", "accuracy")
    if not (of and split == "train")
)


def check_checkpoint(config: Config) -> Iterator[str]:
    """What goes into a checkpoint, and which is the best."""
    names = config.checkpoint.extra_state
    if "progress" not in names:
        yield f"checkpoint.extra_state={names} must hold progress: a run can't resume without its position"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"checkpoint.extra_state names {name} more than once"
    if config.train.precision == "fp16" and "scaler" not in names:
        yield f"checkpoint.extra_state={names} must hold scaler, since train.precision=fp16 scales the loss"
    metric, order = config.checkpoint.checkpoint_score_attribute, config.checkpoint.checkpoint_score_order
    key = f"checkpoint.checkpoint_score_attribute={metric}"
    saved = [name for name in LOGGED_METRICS if not name.startswith("test_")]
    if metric not in saved:
        why = "is measured once, at the end" if metric in LOGGED_METRICS else "is written by no run"
        yield f"{key} {why}.{did_you_mean(metric, saved)} Metrics: {', '.join(saved)}"
    elif order != (better := "min" if "_loss" in metric else "max"):
        yield f"{key} is best at its {better}imum, and checkpoint.checkpoint_score_order={order}: set that to {better}"
