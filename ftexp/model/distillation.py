"""Distillation: the loss term that compares a student with a frozen teacher, by timm's formulas.

timm's own tasks return a batch's mean. Here each sample has a value, so that the gradient is the mean over the global
batch for any number of workers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.task.distillation import FeatureDistillationTrainableModule
from torch import Tensor, nn

from ftexp.config.schema import FEATURES, TOKEN, DistillConfig
from ftexp.errors import ConfigError
from ftexp.model.teacher import Teacher, num_features


class Distiller:
    """A student and its teacher.

    `trainable` is the module that DDP wraps and the optimiser trains: the model, or the model with a projection of its
    features to the teacher's width. The projection is not part of the saved model.
    """

    def __init__(self, config: DistillConfig, model: nn.Module, teacher: Teacher, seed: int) -> None:
        """seed: seed of the projection's initialisation."""
        self._config, self._teacher = config, teacher
        self.projection: nn.Module | None = None
        self.trainable = model
        if config.kind == TOKEN:
            model.set_distilled_training(True)  # type: ignore[operator]  # in training, it then returns both heads' logits
        elif config.kind == FEATURES:
            self.projection = _projection(num_features(model), num_features(teacher.model), seed)
            self.trainable = FeatureDistillationTrainableModule(model, self.projection)

    def answers(self, images: Tensor) -> Tensor:
        """Return the teacher's logits or features for a student's batch, [rows, ...]."""
        return self._teacher(images, features=self._config.kind == FEATURES)

    def split(self, output: Any) -> tuple[Any, Any]:
        """Split the output of `trainable` in training into logits and the output to compare with the teacher."""
        if self._config.kind in (FEATURES, TOKEN):
            if not (isinstance(output, tuple) and len(output) == 2):
                raise ConfigError(f"distill.kind={self._config.kind}: the model returns one output, not two")
            return output
        return output, output

    def losses(self, losses: Tensor, compared: Tensor, answers: Tensor) -> Tensor:
        """Return each sample's loss, [rows]: the weighted sum of `losses`, of the labels, and the teacher's term."""
        alpha = self._config.alpha
        return (1 - alpha) * losses + alpha * term(self._config, compared.float(), answers.float())


def term(config: DistillConfig, compared: Tensor, answers: Tensor) -> Tensor:
    """Return the distance of a student's outputs to the teacher's, [rows]; both are [rows, classes or features]."""
    if config.kind == FEATURES:
        return F.mse_loss(compared, answers, reduction="none").mean(1)
    if config.hard:
        return F.cross_entropy(compared, answers.argmax(1), reduction="none")
    own, wanted = (F.log_softmax(logits / config.temperature, dim=1) for logits in (compared, answers))
    return F.kl_div(own, wanted, reduction="none", log_target=True).sum(1) * config.temperature**2


def _projection(width: int, wanted: int, seed: int) -> nn.Module | None:
    """Return timm's projection, initialised from `seed` only; None if the widths are equal, as in timm."""
    if width == wanted:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, wanted)
