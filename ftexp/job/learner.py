"""The model that is trained, with everything that changes its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftexp.model.distillation import Distiller
from ftexp.model.ema import WeightsEMA
from ftexp.model.freezing import Freezing
from ftexp.model.loss_registry import Loss
from ftexp.model.matching import WeightsReport
from ftexp.model.parallel.parts import reshard

if TYPE_CHECKING:
    from ftexp.model.parallel.sharding import Sharding


@dataclass(kw_only=True)
class Learner:
    """A model, its optimiser, and what goes with them."""

    model: nn.Module  # the bare model: what is saved
    wrapped: nn.Module  # `trainable` under DDP; itself where it is sharded
    wrap: Callable[[nn.Module], nn.Module]  # makes `wrapped` of `trainable`; collective
    optimizer: torch.optim.Optimizer
    scheduler: Any  # a timm scheduler; step_update(n) after n steps
    scaler: torch.amp.GradScaler  # disabled unless fp16
    autocast: torch.autocast  # the context of forward passes; one after the other may use it
    as_logits: Callable[[Any], Tensor]  # checks what the model returns: see `ftexp.model.build.as_logits`
    loss: Loss  # loss of logits float32 [rows, num_classes]; a value for each sample
    freezing: Freezing
    ema: WeightsEMA | None = None
    distiller: Distiller | None = None
    weights_report: WeightsReport | None = None  # report of the weights that it started from, if they were loaded
    sharding: Sharding | None = None  # how ranks share model, gradients, optimiser state and EMA; None: they don't
    counted: nn.Module | None = None  # the model without values, where it is sharded: see `countable`
    # called before weights, optimiser state or EMA change: a checkpoint may still be reading them
    before_change: Callable[[], object] = lambda: None

    @property
    def trainable(self) -> nn.Module:
        """The model, or what holds it and a projection that only training needs."""
        return self.model if self.distiller is None else self.distiller.trainable

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of `images`, under DDP where there is more than one rank, and what a teacher compares."""
        with self.autocast:
            if self.distiller is None:
                logits = self.as_logits(self.wrapped(images))
                return logits, logits
            given, compared = self.distiller.split(self.wrapped(images))
            return self.as_logits(given), compared

    def countable(self) -> nn.Module:
        """Return a model of which FLOPs can be counted, with what is frozen now: a sharded one gathers its weights."""
        if self.counted is None:
            return self.model
        for own, counted in zip(self.model.parameters(), self.counted.parameters(), strict=True):
            counted.requires_grad_(own.requires_grad)
        return self.counted

    def thaw(self, epoch: int) -> bool:
        """Freeze and unfreeze as `epoch` has it; whether that changed anything, and then it is collective.

        DDP is made again then: it averages the gradients of those parameters that needed one when it was made. FSDP2
        looks at each parameter when it gathers it.
        """
        if self.sharding is not None and self.freezing.is_due(epoch):
            reshard(self.model)  # what is gathered stands in the place of the parameters
        if not self.freezing.settle(epoch):
            return False
        self.wrapped = self.trainable  # drop the old DDP wrapper and its hooks before a new one adds hooks
        self.wrapped = self.wrap(self.trainable)
        return True
