"""Names of losses, and the interface of a loss. Imports neither torch nor timm: the driver uses only the names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp.config.checks.wording import unregistered
from ftexp.config.schema import LOSSES, SINGLE_LABEL, LossConfig
from ftexp.errors import ConfigError, UnknownNameError
from ftexp.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossContext:
    """Context in which a loss is built."""

    config: LossConfig
    num_classes: int
    label_smoothing: float  # for class numbers and sets of classes; targets of mixed samples are already smoothed
    task: str = SINGLE_LABEL  # data.task
    num_views: int = 1  # augment.splits: consecutive rows of logits per sample, the clean view first


# (logits float32 [rows, num_classes], targets) -> losses float32 [rows], one per sample, not reduced: the training loop
# takes the mean over the global batch, so that the gradient doesn't depend on the number of workers. Targets by
# data.task:
#   single_label  class numbers, int64 [rows]; of mixed samples, class distributions, float32 [rows, num_classes]
#   multi_label   float32 [rows, num_classes]: 1 for the classes of a sample, else 0; between 0 and 1 if mixed
#   regression    float32 [rows, num_classes]: the targets, standardised if data.standardize_targets
Loss = Callable[["Tensor", "Tensor"], "Tensor"]
LossBuilder = Callable[[LossContext], Loss]
_losses: Registry[Any] = Registry("loss.name")


def register_loss(name: str) -> Callable[[LossBuilder], LossBuilder]:
    """Decorate a function or class that builds a loss: register it as loss.name=`name`."""
    return _losses.register(name)


def loss_builder(name: str) -> LossBuilder:
    """Return the builder of a loss; built-in losses are registered by importing `ftexp.model.losses`."""
    builder: LossBuilder = _losses.get(name)
    return builder


def check_name(name: str) -> None:
    """Raise UnknownNameError for a loss that neither ftexp nor a plug-in provides."""
    known = frozenset([*LOSSES, *_losses])
    if name not in known:
        raise UnknownNameError(unregistered("loss.name", name, sorted(known)))


def check_num_weights(config: LossConfig, num_classes: int) -> None:
    """Raise ConfigError unless the lists of weights have one weight per class of the data."""
    for name in ("class_weights", "pos_weight"):
        weights = getattr(config, name)
        if isinstance(weights, list) and len(weights) != num_classes:
            found = f"{len(weights)} weights, and the data have {num_classes} classes"
            raise ConfigError(f"loss.{name}={weights} has {found}: give one per class")
