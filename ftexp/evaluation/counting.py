"""Counting how well a model does on a split: each sample once, over any number of workers."""

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
    """Return the model's logits, [images, classes]; mirrored: their mean with those of the left-right mirror images."""
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

    models: by the suffix of their metrics' names.
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
    """Return what makes the metrics of one model besides loss and accuracy; None where there are no `names`."""
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
    """Add each model's loss and right answers on `batches` to its meter, and the rest of the first's to `findings`.

    metrics: one for each model, in their order; none where no other metrics are asked for.
    idle: images that models which are sharded are given afterwards, so that all ranks gather them equally often.

    `as_logits` checks what a model returns: see `ftexp.model.build.as_logits`. mirrored: see `logits_of`.
    The models' parts are left in the mode that each was in: what is frozen doesn't train.
    """
    training = [module for model, _ in models for module in model.modules() if module.training]
    for model, _ in models:
        model.eval()
    # what is gathered in inference mode couldn't be trained afterwards
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
