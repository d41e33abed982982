"""What a sweep goes by."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.checkpoint import LOGGED_METRICS
from ftexp.config.schema import Config
from ftexp.registry import did_you_mean


def check_sweep(config: Config) -> Iterator[str]:
    """A sweep's name and objective."""
    name = config.sweep.name
    if name is not None and (not name.strip() or name in (".", "..") or "/" in name):
        yield f"sweep.name={name!r} can't name a folder under run.storage/sweeps: give a name without slashes"
    if config.sweep.metric is not None and config.sweep.metric not in LOGGED_METRICS:
        near = did_you_mean(config.sweep.metric, LOGGED_METRICS)
        yield f"sweep.metric={config.sweep.metric} is written by no run.{near} Metrics: {', '.join(LOGGED_METRICS)}"
    elif config.sweep.metric is not None and config.sweep.mode is None:
        if config.sweep.metric != config.checkpoint.checkpoint_score_attribute:
            yield f"sweep.metric={config.sweep.metric} needs sweep.mode=max or min: which is better?"
