"""Names of losses, and what a loss is. Imports neither torch nor timm: the driver knows losses by name only."""

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
    label_smoothing: float  # for targets that are class numbers, or sets; those of mixed samples are smoothed already
    task: str = SINGLE_LABEL  # data.task
    num_views: int = 1  # augment.splits: rows of logits for each sample, next to one another, the clean view first


# (logits float32 [rows, num_classes], targets) -> losses float32 [rows], one for each sample, never reduced: the loop
# takes the mean over the global batch, so the gradient doesn't depend on the number of workers. Targets are class
# numbers, int64 [rows], or where samples were mixed their distribution, float32 [rows, num_classes]. Under
# data.task=multi_label they are 1 for each class of a sample and 0 for others, or between where samples were mixed, and
# under regression the standardised numbers, float32 [rows, num_classes].
Loss = Callable[["Tensor", "Tensor"], "Tensor"]
LossBuilder = Callable[[LossContext], Loss]
_losses: Registry[Any] = Registry("loss.name")


def register_loss(name: str) -> Callable[[LossBuilder], LossBuilder]:
    """Decorate a function or class: make the loss that it builds available as loss.name=`name`."""
    return _losses.register(name)


def loss_builder(name: str) -> LossBuilder:
    """Return the builder of a loss; those built in are there once `ftexp.model.losses` is imported."""
    builder: LossBuilder = _losses.get(name)
    return builder


def check_name(name: str) -> None:
    """Raise UnknownNameError for a loss that neither ftexp nor a plug-in has."""
    known = frozenset([*LOSSES, *_losses])
    if name not in known:
        raise UnknownNameError(unregistered("loss.name", name, sorted(known)))


def check_num_weights(config: LossConfig, num_classes: int) -> None:
    """Raise ConfigError for weights that are not one for each of the classes that the data have."""
    for name in ("class_weights", "pos_weight"):
        weights = getattr(config, name)
        if isinstance(weights, list) and len(weights) != num_classes:
            found = f"{len(weights)} weights, and the data have {num_classes} classes"
            raise ConfigError(f"loss.{name}={weights} has {found}: give one per class")
