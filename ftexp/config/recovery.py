"""Conditions for replacing a worker that died, while the others wait and then pass their state to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ftexp.config.schema import AUTO, DDP, REPLACE, RESTART, CheckpointConfig, Config


def obstacles(config: Config) -> Iterator[str]:
    """Yield each setting that prevents replacing workers, with what to set instead."""
    scaling, failure = config.scaling, config.failure
    if isinstance(scaling.num_workers, (list, tuple)):
        yield f"scaling.num_workers={list(scaling.num_workers)} changes their number: give one number"
    elif scaling.num_workers == 1:
        yield "scaling.num_workers=1 leaves no worker that could hand its state over: set 2 or more"
    if scaling.use_gpu is True:
        yield "scaling.use_gpu=true: it is supported on CPUs only"
    if scaling.backend not in (None, "gloo"):
        yield f"scaling.backend={scaling.backend}: it is supported for gloo only"
    if config.parallel.kind != DDP:
        yield f"parallel={config.parallel.kind} keeps no whole copy of the state on any worker: set parallel=ddp"
    if failure.on_nonfinite == "rollback":
        yield "failure.on_nonfinite=rollback keeps a second state in each worker: set failure.on_nonfinite=skip_step"
    empty = {name for name, is_on in (("ema", config.ema.decay), ("distill", config.distill.teacher)) if is_on is None}
    lacking = [name for name in CheckpointConfig().extra_state if name not in (*config.checkpoint.extra_state, *empty)]
    if lacking:
        yield f"checkpoint.extra_state lacks {', '.join(lacking)}, which could not be handed over: add them"


def decided(config: Config, num_workers: object, use_gpu: bool) -> Config:
    """Return the config with failure.recovery resolved to replace or restart.

    num_workers, use_gpu: resolved values, never `auto`.
    """
    failure = config.failure
    can = isinstance(num_workers, int) and num_workers > 1 and not use_gpu and not any(obstacles(config))
    recovery = REPLACE if failure.recovery in (AUTO, REPLACE) and can else RESTART
    return dataclasses.replace(config, failure=dataclasses.replace(failure, recovery=recovery))
