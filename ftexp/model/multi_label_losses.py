"""Losses for data.task=multi_label: a binary loss per class, as in timm and torchvision.

Each loss returns a value per sample and class, which `build_per_class` weights and reduces. Targets are float32
[rows, num_classes]: 1 for the classes of a sample and 0 for others, or between 0 and 1 if samples were mixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.loss import AsymmetricLossMultiLabel, BinaryCrossEntropy
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from ftexp.model.loss_registry import Loss, LossContext

Elements = Callable[[Tensor, Tensor], Tensor]  # (logits, targets) -> [rows, num_classes]


def _binary_cross_entropy(context: LossContext) -> Elements:
    config = context.config
    loss: Elements = BinaryCrossEntropy(
        smoothing=context.label_smoothing,
        target_threshold=config.target_threshold,
        pos_weight=_pos_weight(context),
        reduction="none",
        smooth_dense=True,
    )
    return loss


def _asymmetric(context: LossContext) -> Elements:
    """Return the asymmetric loss for multi-label targets (Ridnik et al., 2021)."""
    config = context.config
    loss: Elements = AsymmetricLossMultiLabel(
        gamma_neg=config.gamma_neg,
        gamma_pos=config.gamma_pos,
        clip=config.clip,
        smoothing=context.label_smoothing,
        reduction="none",
        pos_weight=_pos_weight(context),
    )
    return loss


def _focal(context: LossContext) -> Elements:
    """Return the binary focal loss (Lin et al., 2017) without alpha; labels are smoothed as in the other losses."""
    gamma, smoothing = context.config.gamma, context.label_smoothing

    def elements(logits: Tensor, targets: Tensor) -> Tensor:
        smoothed = targets * (1 - smoothing) + 0.5 * smoothing
        found: Tensor = sigmoid_focal_loss(logits, smoothed, alpha=-1, gamma=gamma, reduction="none")
        return found

    return elements


def _pos_weight(context: LossContext) -> Tensor | None:
    given = context.config.pos_weight
    return None if given is None else torch.tensor(given, dtype=torch.float32)


PER_CLASS = {"bce": _binary_cross_entropy, "asl": _asymmetric, "focal": _focal}
_SUMMED = ("asl",)  # losses summed over classes, as by their authors and timm; others are averaged


def build_per_class(context: LossContext, weights: Tensor | None, device: torch.device) -> Loss:
    """Return a built-in multi-label loss. weights: class weights, [num_classes]; None: all are 1."""
    elements = PER_CLASS[context.config.name](context)
    if isinstance(elements, torch.nn.Module):
        elements.to(device)
    sums = context.config.name in _SUMMED or context.config.sum_classes
    weights = None if weights is None else weights.to(device)

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        found = elements(logits, targets)
        if weights is not None:
            found = found * weights.to(found.dtype)
        return found.sum(1) if sums else found.mean(1)

    return losses
