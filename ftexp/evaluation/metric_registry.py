"""Names of metrics, and what a metric is. Imports neither torch nor torchmetrics: the driver knows metrics by name."""

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
    """One evaluation of one model, on one rank, for which a metric is built."""

    task: str  # data.task
    num_classes: int
    class_names: Sequence[str]
    device: torch.device  # device of what `update` gets, and of what ranks send to each other
    predictions: Predictions  # `predictions.keep()` keeps all of the split, for metrics that are not sums
    # where targets are standardised: what 1 of the model's outputs is in the unit of the targets
    target_std: Sequence[float] | None = None


class Metric(Protocol):
    """One number over a split; a `torchmetrics.Metric` is one, which sums its states over ranks by itself.

    Sums of whole numbers are the same bits over any number of workers and any batch size; sums of floats aren't.
    """

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch of this rank: logits float32 [rows, num_classes], targets as losses take them."""
        ...

    def compute(self) -> Any:
        """Return the number over all ranks; collective, and called once."""
        ...


MetricBuilder = Callable[[MetricContext], Metric]
B = TypeVar("B", bound=MetricBuilder)
_metrics: Registry[MetricBuilder] = Registry("train.metrics")
_kinds = dict(METRICS)


def register_metric(name: str, better: str = "max", tasks: Sequence[str] = ()) -> Callable[[B], B]:
    """Decorate a function or class: log the metric that it builds where train.metrics has `name`.

    better: max or min, which way the metric is better. tasks: those that it is for; by default single_label.
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
    """Return the builder of a metric; those built in are there once `ftexp.evaluation.metrics` is imported."""
    return _metrics.get(name)


def check_names(names: Sequence[str], task: str) -> None:
    """Raise ConfigError for a metric that neither ftexp nor a plug-in has, or that is for other tasks."""
    for name in names:
        if name not in _kinds:
            raise UnknownNameError(unregistered("train.metrics", name, sorted(_kinds)))
        if task not in _kinds[name].tasks:
            raise ConfigError(f"metric {name} is for {' and '.join(_kinds[name].tasks)}, and the task is {task}")


def check_metrics(config: Config, task: str) -> None:
    """Raise ConfigError for names in train.metrics as `check_names`, and for a best that is the worst.

    To be called once plug-ins are imported: which way their metrics are better is known then.
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
    """Return whether a logged metric, of a plug-in's perhaps, is better at its max or its min."""
    return better_of_built_in(logged) or _kinds[name_of(logged)].better


def check_num_classes(names: Sequence[str], num_classes: int) -> None:
    """Raise ConfigError for a metric that is the same whatever is predicted of so many classes."""
    if "top5" in names and num_classes <= _TOP:
        raise ConfigError(f"metric top5 is always 1, since the data have {num_classes} classes: remove it")
