"""The learning rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2

from ftexp.config.schema import ScheduleConfig


def build_scheduler(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, falling_steps: int, steps_per_epoch: float
) -> Any:
    """Create a timm scheduler whose `step_update(n)` sets the learning rate after n optimiser steps.

    The learning rate depends on n only, so a resumed run needs nothing else. falling_steps: steps until the rate has
    reached min_lr, without those of `config.cooldown_epochs`.
    """
    falling_steps = max(1, falling_steps)
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), falling_steps - 1)
    constant = config.name == "constant"  # a step schedule without decay: not every supported timm has "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else config.name,
        num_epochs=falling_steps,  # timm counts in epochs; here each is one step
        decay_epochs=max(1, round(config.decay_epochs * steps_per_epoch)),
        warmup_epochs=warmup_steps,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        decay_rate=1.0 if constant else config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    scheduler.step_update(0)
    return scheduler
