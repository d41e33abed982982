"""Names of metrics and their interface. Imports neither torch nor torchmetrics: the driver uses only the names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ftexp.config.checks.metrics import better_of as better_of_built_in
from ftexp.config.checks.metrics import name_of
from ftexp.config.checks.wording import unregistered
from ftexp.config.metric_names import ALWAYS_LOGGED, METRICS, MetricKind
from ftexp.config.schema import Config
from ftexp.errors import ConfigError, UnknownNameError
from ftexp.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ftexp.evaluation.predictions import Predictions

_TOP = 5


@dataclass(frozen=True)
class MetricContext:
    """Context in which a metric is built: one evaluation of one model on one rank."""

    task: str  # data.task
    num_classes: int
    class_names: Sequence[str]
    device: torch.device  # device of the arguments of `update`, and of tensors in collectives
    predictions: Predictions  # `predictions.keep()` keeps all predictions, for metrics that are not sums over samples
    # standard deviation of each target, by which outputs are multiplied for the data's units; None: not standardised
    target_std: Sequence[float] | None = None


class Metric(Protocol):
    """A number over a split. A `torchmetrics.Metric` implements this interface and sums its states over ranks itself.

    Sums of integers are bitwise identical for any number of workers and any batch size; sums of floats are not.
    """

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch of this rank: logits float32 [rows, num_classes], targets as for losses."""
        ...

    def compute(self) -> Any:
        """Return the metric over all ranks; collective, called once."""
        ...


MetricBuilder = Callable[[MetricContext], Metric]
B = TypeVar("B", bound=MetricBuilder)
_metrics: Registry[MetricBuilder] = Registry("train.metrics")
_kinds = dict(METRICS)


def register_metric(name: str, better: str = "max", tasks: Sequence[str] = ()) -> Callable[[B], B]:
    """Decorate a function or class that builds a metric: register it under `name` for train.metrics.

    better: max or min, whichever is better. tasks: tasks that the metric supports; by default single_label.
    """
    if better not in ("max", "min"):
        raise ValueError(f"metric '{name}': better='{better}' must be max or min")
    if name in ALWAYS_LOGGED or name.endswith("_ema") or not name.isidentifier():
        raise ValueError(f"metric '{name}': the name must be an identifier, not loss or accuracy, and not end in _ema")

    def decorate(builder: B) -> B:
        _metrics.register(name)(builder)
        _kinds.setdefault(name, MetricKind(better, tuple(tasks)) if tasks else MetricKind(better))
        return builder

    return decorate


def metric_builder(name: str) -> MetricBuilder:
    """Return the builder of a metric; built-in metrics are registered by importing `ftexp.evaluation.metrics`."""
    return _metrics.get(name)


def check_names(names: Sequence[str], task: str) -> None:
    """Raise ConfigError for a metric that neither ftexp nor a plug-in provides, or that doesn't support `task`."""
    for name in names:
        if name not in _kinds:
            raise UnknownNameError(unregistered("train.metrics", name, sorted(_kinds)))
        if task not in _kinds[name].tasks:
            raise ConfigError(f"metric {name} is for {' and '.join(_kinds[name].tasks)}, and the task is {task}")


def check_metrics(config: Config, task: str) -> None:
    """Raise ConfigError for invalid names in train.metrics, and for settings that would prefer the worst value.

    Call this after the import of plug-ins: only then it is known whether larger or smaller is better for their metrics.
    """
    check_names(config.train.metrics, task)
    scored, order = config.checkpoint.checkpoint_score_attribute, config.checkpoint.checkpoint_score_order
    if order != (better := better_of(scored)):
        raise ConfigError(
            f"checkpoint.checkpoint_score_attribute={scored} is best at its {better}imum, and "
            f"checkpoint.checkpoint_score_order={order}: set it to {better}"
        )
    stopping = config.stopping
    if stopping.metric is not None and stopping.mode not in (None, better_of(stopping.metric)):
        raise ConfigError(f"stopping.mode={stopping.mode} is the worst of stopping.metric={stopping.metric}: remove it")


def better_of(logged: str) -> str:
    """Return "max" or "min", whichever is better for a logged metric, built in or from a plug-in."""
    return better_of_built_in(logged) or _kinds[name_of(logged)].better


def check_num_classes(names: Sequence[str], num_classes: int) -> None:
    """Raise ConfigError for a metric that is constant for this number of classes."""
    if "top5" in names and num_classes <= _TOP:
        raise ConfigError(f"metric top5 is always 1, since the data have {num_classes} classes: remove it")
