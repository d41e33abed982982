"""Counting how well a model does on a split: each sample once, over any number of workers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftexp.progress import Meter


@torch.inference_mode()
def count_into(
    meter: Meter,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: torch.autocast,
    confusion: Tensor | None = None,
) -> None:
    """Add loss and right answers of `batches` to `meter`; the model is left in training mode.

    confusion: int64 [num_classes, num_classes], counted up in place as [label, prediction].
    """
    model.eval()
    for images, labels in batches:
        with autocast:
            logits = model(images)
        predictions = logits.argmax(1)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        meter.add(losses, predictions == labels, torch.ones_like(labels, dtype=torch.bool))
        if confusion is not None:
            confusion.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    model.train()
