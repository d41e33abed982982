"""Checks of sweeps."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.metrics import logged_metrics, unlogged
from ftexp.config.schema import Config


def check_sweep(config: Config) -> Iterator[str]:
    """Check a sweep's name and objective."""
    name = config.sweep.name
    if name is not None and (not name.strip() or name in (".", "..") or "/" in name):
        yield f"sweep.name={name!r} is not a valid directory name under run.storage/sweeps: give a name without slashes"
    logged = logged_metrics(config)
    if config.sweep.metric is not None and config.sweep.metric not in logged:
        yield unlogged("sweep.metric", config.sweep.metric, logged)
    elif config.sweep.metric is not None and config.sweep.mode is None:
        if config.sweep.metric != config.checkpoint.checkpoint_score_attribute:
            yield f"sweep.metric={config.sweep.metric} needs sweep.mode: set max or min, whichever is better"
