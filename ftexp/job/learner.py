"""The model that is trained, with everything that changes its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftexp.model.ema import WeightsEMA
from ftexp.model.freezing import Freezing
from ftexp.model.loss_registry import Loss
from ftexp.model.matching import WeightsReport


@dataclass(kw_only=True)
class Learner:
    """A model, its optimiser, and what goes with them."""

    model: nn.Module  # the bare model: what is saved
    wrapped: nn.Module  # the same under DDP: what is trained
    wrap: Callable[[nn.Module], nn.Module]  # makes `wrapped` of `model`; collective
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's; step_update(n) after n steps
    scaler: torch.amp.GradScaler  # disabled unless fp16
    autocast: torch.autocast  # the context of forward passes; one after the other may use it
    as_logits: Callable[[Any], Tensor]  # checks what the model returns: see `ftexp.model.build.as_logits`
    loss: Loss  # of logits float32 [rows, num_classes]; a value for each sample
    freezing: Freezing
    ema: WeightsEMA | None = None
    weights_report: WeightsReport | None = None  # of the weights that it started from, if they were loaded

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`, under DDP where there is more than one rank."""
        with self.autocast:
            return self.as_logits(self.wrapped(images))

    def thaw(self, epoch: int) -> bool:
        """Freeze and unfreeze as `epoch` has it; whether that changed anything, and then it is collective.

        DDP is made again then: it averages the gradients of those parameters that needed one when it was made.
        """
        if not self.freezing.settle(epoch):
            return False
        self.wrapped = self.model  # the old one's hooks go with it, before the new one's come
        self.wrapped = self.wrap(self.model)
        return True
