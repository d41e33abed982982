"""Counting how well a model does on a split: each sample once, over any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftexp.evaluation.meter import Meter
from ftexp.evaluation.mistakes import Findings

if TYPE_CHECKING:
    from ftexp.evaluation.metric_set import MetricSet


def logits_of(model: nn.Module, images: Tensor, as_logits: Callable[[Any], Tensor], mirrored: bool = False) -> Tensor:
    """Return the model's logits, [images, classes]; mirrored: their mean with those of the left-right mirror images."""
    logits = as_logits(model(images))
    return (logits + as_logits(model(images.flip(-1)))) / 2 if mirrored else logits


@torch.inference_mode()
def count_into(
    models: Sequence[tuple[nn.Module, Meter]],
    as_logits: Callable[[Any], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    findings: Findings | None = None,
    mirrored: bool = False,
    metrics: Sequence[MetricSet] = (),
) -> None:
    """Add each model's loss and right answers on `batches` to its meter, and the rest of the first's to `findings`.

    metrics: one for each model, in their order; none where no other metrics are asked for.

    `as_logits` checks what a model returns: see `ftexp.model.build.as_logits`. mirrored: see `logits_of`.
    The models' parts are left in the mode that each was in: what is frozen doesn't train.
    """
    training = [module for model, _ in models for module in model.modules() if module.training]
    for model, _ in models:
        model.eval()
    for images, labels in batches:
        for number, (model, meter) in enumerate(models):
            with autocast:
                logits = logits_of(model, images, as_logits, mirrored)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            meter.add(losses, logits.argmax(1) == labels, torch.ones_like(labels, dtype=torch.bool))
            if metrics:
                metrics[number].update(logits.float(), labels)
            if findings is not None and number == 0:
                findings.add(images, labels, logits)
    for module in training:
        module.training = True
