"""Counting how well a model does on a split: each sample once, over any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftexp.evaluation.meter import Meter, means
from ftexp.evaluation.mistakes import Findings


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
) -> dict[str, float]:
    """Return `<split>_loss` and `<split>_accuracy` of each model, with its suffix, over all ranks; collective."""
    meters = {suffix: Meter(next(model.parameters()).device) for suffix, model in models.items()}
    count_into(list(zip(models.values(), meters.values(), strict=True)), as_logits, batches, autocast, findings)
    values: dict[str, float] = {}
    for suffix, meter in meters.items():
        loss, accuracy = means(meter.totals())
        values |= {f"{split}_loss{suffix}": loss, f"{split}_accuracy{suffix}": accuracy}
    return values


@torch.inference_mode()
def count_into(
    models: Sequence[tuple[nn.Module, Meter]],
    as_logits: Callable[[Any], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    findings: Findings | None = None,
    mirrored: bool = False,
) -> None:
    """Add each model's loss and right answers on `batches` to its meter, and the rest of the first's to `findings`.

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
            if findings is not None and number == 0:
                findings.add(images, labels, logits)
    for module in training:
        module.training = True
