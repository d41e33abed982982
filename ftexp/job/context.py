"""The part of a run, on one rank, that both states and hooks receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftexp.config.schema import Config
    from ftexp.job.group import ProcessGroup
    from ftexp.job.learner import Learner
    from ftexp.job.progress import Progress
    from ftexp.model.ema import WeightsEMA


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """A run on one rank, with the objects that training uses."""

    config: Config
    rank: int
    world_size: int
    device: torch.device
    progress: Progress  # step, position, epoch, metrics, best
    model: nn.Module  # the bare model, without DDP
    optimizer: torch.optim.Optimizer
    ema: WeightsEMA | None  # EMA of the weights, if one is configured


def shared_fields(config: Config, group: ProcessGroup, learner: Learner, progress: Progress) -> dict[str, Any]:
    """Return the fields of a `TrainingContext`, by name."""
    return {
        "config": config,
        "rank": group.rank,
        "world_size": group.world_size,
        "device": group.device,
        "progress": progress,
        "model": learner.model,
        "optimizer": learner.optimizer,
        "ema": learner.ema,
    }
