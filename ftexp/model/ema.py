"""The moving average of the weights: timm's ModelEmaV3, moved on by steps that changed the weights."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn

from ftexp.config.schema import EmaConfig


class WeightsEMA:
    """A model whose weights, and batch norm's statistics, are the average of another's. On that one's device."""

    def __init__(self, config: EmaConfig, model: nn.Module) -> None:
        assert config.decay is not None, "an average without a decay is no average"
        self._ema = ModelEmaV3(
            model,
            decay=config.decay,
            use_warmup=config.use_warmup,
            warmup_gamma=config.warmup_gamma,
            warmup_power=config.warmup_power,
            update_after_step=config.update_after_step,
        )
        # how far the average has come is the run's step, so that it is the same after a restart
        self.model: nn.Module = self._ema.module

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after optimiser step number `step`, counted from 1."""
        self._ema.update(model, step=step)

    def begin_at(self, model: nn.Module) -> None:
        """Forget what was averaged: the weights of `model` are all there is."""
        self._ema.set(model)
