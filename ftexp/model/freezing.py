"""Freezing of parts of a model, for all of training or until a given epoch.

A frozen parameter has requires_grad=False: no gradient is computed for it, DDP excludes it, and the optimiser skips it
and keeps no state for it. The optimiser gets all parameters at the start: the state of a part is created when the part
is unfrozen, and checkpoints have the same parameter groups before and after. The epoch alone determines which parts are
frozen. Batch norm in a frozen part uses its running statistics and does not update them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ftexp.errors import ConfigError
from ftexp.registry import did_you_mean

BACKBONE = "backbone"
_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")
_NEVER = float("inf")


class Freezing:
    """The epochs in which each parameter trains.

    ConfigError if the model lacks a part of `freeze`, or if all parameters are frozen in epoch 0.
    """

    def __init__(self, freeze: dict[str, Any], model: nn.Module) -> None:
        self._model = model
        self._first_epoch: dict[str, float] = {}  # parameter name -> first epoch that trains it
        for part, epoch in freeze.items():
            for name in parameters_of(part, model):
                first = _NEVER if epoch is None else float(epoch)
                self._first_epoch[name] = max(first, self._first_epoch.get(name, 0.0))
        self._stages = sorted({0.0, *self._first_epoch.values()} - {_NEVER})
        self._stage: float | None = None
        if freeze and all(self._first_epoch.get(name, 0.0) > 0 for name, _ in model.named_parameters()):
            raise ConfigError(
                f"train.freeze={freeze} freezes all parameters in epoch 0: unfreeze one of {_parts(model)}"
            )

    def is_due(self, epoch: int) -> bool:
        """Return whether `settle` would change anything."""
        return self._stage_of(epoch) != self._stage

    def _stage_of(self, epoch: int) -> float:
        return max(first for first in self._stages if first <= epoch)

    def settle(self, epoch: int) -> bool:
        """Freeze and unfreeze parameters for `epoch`, counted from 0; return whether that changed anything."""
        if not self.is_due(epoch):
            return False
        self._stage = stage = self._stage_of(epoch)
        for name, parameter in self._model.named_parameters():
            trains = self._first_epoch.get(name, 0.0) <= stage
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
        for module in self._model.modules():
            if isinstance(module, _BatchNorm):
                own = list(module.parameters(recurse=False))
                module.train(not own or any(parameter.requires_grad for parameter in own))
        return bool(self._first_epoch)

    @property
    def num_frozen(self) -> int:
        """Number of values in the parameters that are frozen now."""
        return sum(parameter.numel() for parameter in self._model.parameters() if not parameter.requires_grad)


def parameters_of(part: str, model: nn.Module) -> list[str]:
    """Return the names of the parameters in `part`; ConfigError if there are none.

    `backbone`: all but timm's classifier. `layers.0-5`: layers by timm's numbering, as in layer-wise decay. Otherwise a
    pattern with * and ? that matches the name of a parameter or of a module that contains it.
    """
    names = [name for name, _ in model.named_parameters()]
    if part == BACKBONE:
        head = classifier_parameters(model)
        found = [name for name in names if name not in head]
        if not head:
            raise ConfigError(f"train.freeze.{part}: timm does not name the classifier of this model; name its parts")
    elif numbers := _LAYERS.fullmatch(part):
        number = _layer_numbers(model, part)
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        found = [name for name in names if first <= number.get(name, -1) <= last]
        if not found:
            raise ConfigError(f"train.freeze.{part}: the model has layers 0 to {max(number.values())}")
    else:
        found = [name for name in names if _matches(name, part)]
        if not found:
            raise ConfigError(
                f"train.freeze.{part} matches no parameter of the model.{did_you_mean(part, _modules(names))} "
                f"Its parts: {_parts(model)}; or write {BACKBONE}, or layers.0-5"
            )
    return found


def classifier_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters of timm's classifier; empty if the model doesn't name its classifier."""
    get_classifier: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    if get_classifier is None:
        return set()
    heads = get_classifier()
    own = {
        id(parameter)
        for head in (heads if isinstance(heads, (list, tuple)) else (heads,))
        if isinstance(head, nn.Module)
        for parameter in head.parameters()
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def _layer_numbers(model: nn.Module, part: str) -> dict[str, int]:
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ConfigError(f"train.freeze.{part}: the model numbers no layers (it has no group_matcher); name its parts")
    numbers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
    return numbers


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def _modules(names: Iterable[str]) -> set[str]:
    return {".".join(name.split(".")[:count]) for name in names for count in (1, 2)}


def _parts(model: nn.Module) -> str:
    """Return the model's top-level parts that have parameters, as text."""
    return ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
