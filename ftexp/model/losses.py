"""The built-in training losses, by timm's and torch's functions, and class weights.

Each loss returns one value per sample; see `ftexp.model.loss_registry.Loss`. The losses for data.task=multi_label are
in `ftexp.model.multi_label_losses`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossSingleLabel, BinaryCrossEntropy, PolyCrossEntropy, compute_class_weights
from torch import Tensor

from ftexp.config.schema import MULTI_LABEL, SINGLE_LABEL, LossConfig
from ftexp.model.loss_registry import Loss, LossContext, loss_builder, register_loss
from ftexp.model.multi_label_losses import PER_CLASS, build_per_class

_MIN_PROBABILITY = 1e-7  # minimum of the views' mean probability, as in timm's JsdCrossEntropy


@register_loss("ce")
def _cross_entropy(context: LossContext) -> Loss:
    """Return torch's softmax cross-entropy."""
    return functools.partial(_torch_cross_entropy, smoothing=context.label_smoothing)


def _torch_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    smoothing = smoothing if targets.ndim == 1 else 0.0
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


@register_loss("bce")
def _binary_cross_entropy(context: LossContext) -> Loss:
    """Return the mean or sum of each class's binary cross-entropy (Wightman et al., "ResNet strikes back", 2021)."""
    config = context.config
    every_class = BinaryCrossEntropy(
        smoothing=context.label_smoothing,
        target_threshold=config.target_threshold,
        pos_weight=None if config.pos_weight is None else torch.tensor(config.pos_weight, dtype=torch.float32),
        reduction="none",
    )
    reduced = Tensor.sum if config.sum_classes else Tensor.mean

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        return reduced(every_class.to(logits.device)(logits, targets), 1)

    return losses


@register_loss("focal")
def _focal(context: LossContext) -> Loss:
    """Return cross-entropy times (1 - p) ** gamma, where p is the probability of the right class (Lin et al., 2017)."""
    gamma, smoothing = context.config.gamma, context.label_smoothing
    focal: Loss = AsymmetricLossSingleLabel(gamma_pos=gamma, gamma_neg=0.0, eps=smoothing, reduction="none")
    return focal


@register_loss("asl")
def _asymmetric(context: LossContext) -> Loss:
    """Return the asymmetric loss for one label (Ridnik et al., 2021)."""
    config, smoothing = context.config, context.label_smoothing
    loss: Loss = AsymmetricLossSingleLabel(config.gamma_pos, config.gamma_neg, eps=smoothing, reduction="none")
    return loss


@register_loss("poly")
def _poly(context: LossContext) -> Loss:
    """Return cross-entropy plus epsilon * (1 - p): Poly-1 (Leng et al., 2022)."""
    loss: Loss = PolyCrossEntropy(context.config.epsilon, smoothing=context.label_smoothing, reduction="none")
    return loss


@register_loss("jsd")
def _jensen_shannon(context: LossContext) -> Loss:
    """Return cross-entropy of the clean view plus alpha times the Jensen-Shannon divergence of all views.

    This is timm's JsdCrossEntropy per sample (Hendrycks et al., "AugMix", 2020).
    """
    views, alpha, smoothing = context.num_views, context.config.alpha, context.label_smoothing

    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        by_view = logits.view(-1, views, logits.shape[1])
        log_probabilities = by_view.log_softmax(2)
        probabilities = log_probabilities.exp()
        log_mixture = probabilities.mean(1, keepdim=True).clamp(_MIN_PROBABILITY, 1).log()
        # not by kl_div as in timm, which has no gradient where a probability is 0
        divergences = (probabilities * (log_probabilities - log_mixture)).sum(2).mean(1)
        return _torch_cross_entropy(by_view[:, 0], targets, smoothing) + alpha * divergences

    return losses


@register_loss("mse")
def _squared_error(_: LossContext) -> Loss:
    return lambda outputs, targets: F.mse_loss(outputs, targets, reduction="none").mean(1)


@register_loss("l1")
def _absolute_error(_: LossContext) -> Loss:
    return lambda outputs, targets: F.l1_loss(outputs, targets, reduction="none").mean(1)


@register_loss("huber")
def _huber(context: LossContext) -> Loss:
    delta = context.config.delta
    return lambda outputs, targets: F.huber_loss(outputs, targets, reduction="none", delta=delta).mean(1)


def build_loss(context: LossContext, counts: Callable[[], Sequence[int]], device: torch.device) -> Loss:
    """Return the loss of a run. counts: returns the number of training samples per class, [num_classes]."""
    weights = class_weights(context.config, counts, context.task)
    if context.task == MULTI_LABEL and context.config.name in PER_CLASS:
        return build_per_class(context, weights, device)
    loss = loss_builder(context.config.name)(context)
    return loss if weights is None else functools.partial(_weighted, loss, weights.to(device))


def class_weights(config: LossConfig, count: Callable[[], Sequence[int]], task: str = SINGLE_LABEL) -> Tensor | None:
    """Return the class weights, float32 [num_classes], or None if all are 1.

    A list is used unchanged. Weights computed from counts are scaled to a mean of 1 over the training samples, so that
    the loss keeps its scale and the learning rate still fits. With data.task=multi_label, each class has a term in
    every sample, so the mean over classes is 1. A class without samples gets the weight of a class with one sample.
    """
    given = config.class_weights
    if given == "none":
        return None
    if not isinstance(given, str):
        return torch.tensor(given, dtype=torch.float32)
    counts = count()
    _, weights = compute_class_weights(counts, max(1, sum(counts)), method=given, beta=config.effective_num_beta)
    if task == MULTI_LABEL:
        found: Tensor = weights
        return found
    counted = torch.tensor(counts, dtype=torch.float64)
    scaled: Tensor = weights.double() * (counted.sum() / torch.dot(weights.double(), counted))
    return scaled.float()


def _weighted(loss: Loss, weights: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Return each sample's loss times its class weight; for a mixed sample, the mean weight by its class shares."""
    return loss(logits, targets) * (weights[targets] if targets.ndim == 1 else targets @ weights.to(targets.dtype))
