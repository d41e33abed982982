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
    """A model with its optimiser, schedule, loss, EMA and wrapper."""

    model: nn.Module  # the bare model: what is saved
    wrapped: nn.Module  # `trainable` under DDP; `trainable` itself if sharded
    wrap: Callable[[nn.Module], nn.Module]  # makes `wrapped` from `trainable`; collective
    optimizer: torch.optim.Optimizer
    scheduler: Any  # a timm scheduler; step_update(n) after n steps
    scaler: torch.amp.GradScaler  # disabled unless fp16
    autocast: torch.autocast  # context of forward passes; can be entered again once it was left
    as_logits: Callable[[Any], Tensor]  # checks what the model returns: see `ftexp.model.build.as_logits`
    loss: Loss  # loss of logits float32 [rows, num_classes]; a value for each sample
    freezing: Freezing
    ema: WeightsEMA | None = None
    distiller: Distiller | None = None
    weights_report: WeightsReport | None = None  # report of the weights that it started from, if they were loaded
    sharding: Sharding | None = None  # how ranks share model, gradients, optimiser state and EMA; None: they don't
    counted: nn.Module | None = None  # a sharded model's copy without values: see `countable`
    # called before weights, optimiser state or EMA change: a checkpoint may still be reading them
    before_change: Callable[[], object] = lambda: None

    @property
    def trainable(self) -> nn.Module:
        """The model, or a module that contains it and a projection that only training needs."""
        return self.model if self.distiller is None else self.distiller.trainable

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of `images`, and the output that is compared with a teacher's; with DDP if there is any."""
        with self.autocast:
            if self.distiller is None:
                logits = self.as_logits(self.wrapped(images))
                return logits, logits
            given, compared = self.distiller.split(self.wrapped(images))
            return self.as_logits(given), compared

    def countable(self) -> nn.Module:
        """Return a model to count FLOPs with, frozen as it is now: a sharded model would gather its weights."""
        if self.counted is None:
            return self.model
        for own, counted in zip(self.model.parameters(), self.counted.parameters(), strict=True):
            counted.requires_grad_(own.requires_grad)
        return self.counted

    def thaw(self, epoch: int) -> bool:
        """Freeze and unfreeze parameters for `epoch`; returns whether any changed, and is collective then.

        After a change, DDP is built again, since it averages the gradients of those parameters that needed one when it
        was built. FSDP2 checks each parameter when it gathers it.
        """
        if self.sharding is not None and self.freezing.is_due(epoch):
            reshard(self.model)  # gathered tensors replace the parameters
        if not self.freezing.settle(epoch):
            return False
        self.wrapped = self.trainable  # drop the old DDP wrapper and its hooks before a new one adds hooks
        self.wrapped = self.wrap(self.trainable)
        return True
