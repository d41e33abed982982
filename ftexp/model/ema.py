"""The EMA of the weights: timm's ModelEmaV3, updated after each step that changed the weights."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ftexp.config.schema import EmaConfig
from ftexp.model.parallel.parts import local


class WeightsEMA:
    """A copy of a model, on its device, whose weights and batch norm statistics are the EMA of the model's."""

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        self._ema = ModelEmaV3(model, **_arguments(config))
        # the decay depends on the run's step, so that it is the same after a restart
        self.model: nn.Module = self._ema.module

    def update(self, model: nn.Module, step: int) -> None:
        """Update the EMA with the weights of `model` after optimiser step number `step`, counted from 1."""
        self._ema.update(model, step=step)

    def begin_at(self, model: nn.Module) -> None:
        """Reset the EMA to the weights of `model`."""
        self._ema.set(model)


class ShardedEMA(WeightsEMA):
    """The EMA of a sharded model: each rank averages its own shard, by timm's formula and decays."""

    def __init__(self, config: EmaConfig, copied: nn.Module) -> None:
        """copied: sharded copy of the model, with the same values."""
        self._ema = ModelEmaV3(nn.Linear(1, 1), **_arguments(config))  # used only to compute the decays
        self.model = copied.eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the EMA with the weights of `model` after optimiser step number `step`, counted from 1."""
        weight = 1.0 - self._ema.get_decay(step)
        for average, value in self._pairs(model):
            if average.is_floating_point():
                average.lerp_(value, weight=weight)
            else:
                average.copy_(value)

    @torch.no_grad()
    def begin_at(self, model: nn.Module) -> None:
        """Reset the EMA to the weights of `model`."""
        for average, value in self._pairs(model):
            average.copy_(value)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        own, others = self.model.state_dict().values(), model.state_dict().values()
        return [(local(average), local(value)) for average, value in zip(own, others, strict=True)]


def _arguments(config: EmaConfig) -> dict[str, Any]:
    assert config.decay is not None, "an average without a decay is no average"
    return {
        "decay": config.decay,
        "use_warmup": config.use_warmup,
        "warmup_gamma": config.warmup_gamma,
        "warmup_power": config.warmup_power,
        "update_after_step": config.update_after_step,
    }
