"""Evaluation of models on a split: each sample is counted once, over any number of workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftexp.config.schema import SINGLE_LABEL
from ftexp.evaluation.findings import Findings
from ftexp.evaluation.meter import Meter
from ftexp.evaluation.tasks import TASKS, named_means
from ftexp.model.parallel.parts import is_sharded, reshard

if TYPE_CHECKING:
    from ftexp.data.info import DataInfo
    from ftexp.evaluation.metric_set import MetricSet


def logits_of(model: nn.Module, images: Tensor, as_logits: Callable[[Any], Tensor], mirrored: bool = False) -> Tensor:
    """Return the model's logits, [images, classes]; mirrored: the mean with the logits of the mirrored images."""
    logits = as_logits(model(images))
    return (logits + as_logits(model(images.flip(-1)))) / 2 if mirrored else logits


def measured(
    split: str,
    models: Mapping[str, nn.Module],
    as_logits: Callable[[Any], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    findings: Findings | None = None,
    metric_set: Callable[[], MetricSet] | None = None,
    task: str = SINGLE_LABEL,
    mirrored: bool = False,
    idle: Iterable[Tensor] = (),
) -> dict[str, float]:
    """Return `<split>_loss`, `<split>_accuracy` and further metrics of each model over all ranks; collective.

    models: {suffix of the metrics' names: model}.
    metric_set: see `metric_set_of`.
    mirrored: see `logits_of`.
    idle: see `count_into`.
    """
    meters = {suffix: Meter(next(model.parameters()).device) for suffix, model in models.items()}
    sets = {suffix: metric_set() for suffix in models} if metric_set is not None else {}
    pairs = list(zip(models.values(), meters.values(), strict=True))
    count_into(pairs, as_logits, batches, autocast, findings, mirrored, list(sets.values()), task, idle)
    values: dict[str, float] = {}
    for suffix, meter in meters.items():
        values |= named_means(split, meter.totals(), task, suffix)
    for suffix, others in sets.items():
        values |= {f"{split}_{name}{suffix}": value for name, value in others.compute().items()}
    return values


def metric_set_of(names: Sequence[str], info: DataInfo, device: torch.device) -> Callable[[], MetricSet] | None:
    """Return a function that builds a model's metrics besides loss and accuracy; None if `names` is empty."""
    if not names:
        return None
    from ftexp.evaluation.metric_set import MetricSet  # it imports torchmetrics

    return functools.partial(MetricSet, names, info.task, info.class_names, device, info.target_std)


def count_into(
    models: Sequence[tuple[nn.Module, Meter]],
    as_logits: Callable[[Any], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    findings: Findings | None = None,
    mirrored: bool = False,
    metrics: Sequence[MetricSet] = (),
    task: str = SINGLE_LABEL,
    idle: Iterable[Tensor] = (),
) -> None:
    """Add each model's losses and right predictions on `batches` to its meter; `findings` gets the first model's.

    as_logits: checks a model's output: see `ftexp.model.build.as_logits`.
    mirrored: see `logits_of`.
    metrics: one per model, in their order; () if there are no other metrics.
    idle: further images for sharded models, so that all ranks gather the models equally often.

    Each module returns to its previous mode: frozen modules are not in training mode.
    """
    training = [module for model, _ in models for module in model.modules() if module.training]
    for model, _ in models:
        model.eval()
    # parameters gathered in inference mode could not be trained afterwards
    with torch.no_grad() if any(is_sharded(model) for model, _ in models) else torch.inference_mode():
        _count(models, as_logits, batches, autocast, findings, mirrored, metrics, task)
        for images in idle:
            for model, _ in models:
                with autocast:
                    model(images)
    for model, _ in models:
        reshard(model)
    for module in training:
        module.training = True


def _count(
    models: Sequence[tuple[nn.Module, Meter]],
    as_logits: Callable[[Any], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    findings: Findings | None,
    mirrored: bool,
    metrics: Sequence[MetricSet],
    task: str,
) -> None:
    judged = TASKS[task]
    for images, labels in batches:
        for number, (model, meter) in enumerate(models):
            with autocast:
                logits = logits_of(model, images, as_logits, mirrored)
            losses, right = judged.losses(logits.float(), labels), judged.right(logits, labels)
            meter.add(losses, right, torch.ones_like(right))
            if metrics:
                metrics[number].update(logits.float(), labels)
            if findings is not None and number == 0:
                findings.add(images, labels, logits)
