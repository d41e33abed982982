"""Counting how well a model does on a split: each sample once, over any number of workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftexp.findings import Findings
from ftexp.progress import Meter


@torch.inference_mode()
def count_into(
    meter: Meter,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    findings: Findings | None = None,
) -> None:
    """Add loss and right answers of `batches` to `meter`, and the rest to `findings`.

    The model is left in training mode.
    """
    model.eval()
    for images, labels in batches:
        with autocast:
            logits = model(images)
        predictions = logits.argmax(1)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        meter.add(losses, predictions == labels, torch.ones_like(labels, dtype=torch.bool))
        if findings is not None:
            findings.add(images, labels, logits)
    model.train()
