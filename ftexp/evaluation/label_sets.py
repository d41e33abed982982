"""Findings for data.task=multi_label: precision and recall at a threshold, and average precision, of each class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ftexp.data.decoder import UInt8s
from ftexp.data.info import DataInfo
from ftexp.data.targets import Bits, packed, unpacked
from ftexp.errors import ConfigError
from ftexp.evaluation.gathering import gathered
from ftexp.evaluation.mistakes import MAX_MISTAKES, Mistake, described_mistakes, mistakes_of, surest_of

DEFAULT_THRESHOLD = 0.5
Float32s = npt.NDArray[np.float32]


def thresholds_of(key: str, given: Any, num_classes: int) -> list[float]:
    """Return the threshold of each class; ConfigError unless `given` is None, a number, or one number per class."""
    values = given if isinstance(given, list) else [DEFAULT_THRESHOLD if given is None else given] * num_classes
    if len(values) != num_classes:
        raise ConfigError(
            f"{key}={given} has {len(values)} thresholds for {num_classes} classes: give one number, or all"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ConfigError(f"{key}={given}: {value!r} is not a probability from 0 to below 1")
    return [float(value) for value in values]


class SetFindings:
    """Findings of multi_label. They take 4 bytes per sample and class; rank 0 gathers those of all ranks."""

    def __init__(self, num_classes: int, thresholds: Sequence[float], to_pixels: Callable[[Tensor], UInt8s]) -> None:
        """to_pixels: converts normalised images back to uint8 rows."""
        self._num_classes, self._thresholds = num_classes, np.array(thresholds, np.float32)
        self._to_pixels, self._mistakes = to_pixels, list[Mistake]()
        self._probabilities: list[Float32s] = []
        self._sets: list[Bits] = []

    def add(self, images: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Count a batch: targets (0 and 1) and logits, both [rows, num_classes]."""
        rows, classes = targets.cpu().numpy().nonzero()
        self._sets.append(packed(rows, classes, len(targets), self._num_classes))
        probabilities = logits.float().sigmoid()
        self._probabilities.append(probabilities.cpu().numpy())
        self._mistakes = surest_of([*self._mistakes, *self._mistaken(images, targets > 0, probabilities)])

    def _mistaken(self, images: Tensor, held: Tensor, probabilities: Tensor) -> list[Mistake]:
        """Return the most confident mistakes of a batch, by the confidence of each sample's worst class."""
        predicted = probabilities > torch.from_numpy(self._thresholds).to(probabilities)
        confidences = torch.where(predicted, probabilities, 1 - probabilities).nan_to_num()
        worst = torch.where(predicted != held, confidences, -1.0).amax(1)
        wrong = (worst >= 0).nonzero().flatten()
        surest = wrong[worst[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES]
        label, prediction = _sets_of(held[surest]), _sets_of(predicted[surest])
        return mistakes_of(worst[surest].tolist(), label, prediction, self._to_pixels(images[surest]))

    def report(self, info: DataInfo) -> dict[str, Any]:
        """Return the content of `evaluation_<split>.json`, on rank 0; collective."""
        parts = gathered((self._probabilities, self._sets, self._mistakes))
        none, nobody = np.empty((0, self._num_classes), np.float32), np.empty(0, np.int64)
        probabilities = np.concatenate([none, *(batch for part, _, _ in parts for batch in part)])
        no_sets = packed(nobody, nobody, 0, self._num_classes)
        sets = np.concatenate([no_sets, *(batch for _, part, _ in parts for batch in part)])
        mistakes = surest_of([mistake for _, _, part in parts for mistake in part])
        held = unpacked(sets, self._num_classes).astype(bool)
        classes = [
            {"class": name, **of_class(probabilities[:, number], held[:, number], self._thresholds[number])}
            for number, name in enumerate(info.class_names)
        ]
        precisions = [row["average_precision"] for row in classes if row["average_precision"] is not None]
        return {
            "num_samples": len(held),
            "labels_per_sample": float(held.sum() / len(held)) if len(held) else None,
            "average_precision": math.fsum(precisions) / len(precisions) if precisions else None,
            "classes": classes,
            "confusion": None,
            "mistakes": described_mistakes(mistakes, info.class_names),
        }


def _sets_of(flags: Tensor) -> list[tuple[int, ...]]:
    """Return the classes of each row. flags: bool [rows, num_classes]."""
    return [tuple(row.nonzero().flatten().tolist()) for row in flags.cpu()]


def of_class(probabilities: Float32s, held: npt.NDArray[np.bool_], threshold: float) -> dict[str, Any]:
    """Return the metrics of one class; a metric is None if it is not defined, such as a precision of 0 predictions."""
    predicted = probabilities > np.float32(threshold)
    right, num_held, num_predicted = int((predicted & held).sum()), int(held.sum()), int(predicted.sum())
    return {
        "num_samples": num_held,
        "threshold": round(float(threshold), 6),
        "recall": right / num_held if num_held else None,
        "precision": right / num_predicted if num_predicted else None,
        "average_precision": average_precision(probabilities, held),
    }


def average_precision(probabilities: Float32s, held: npt.NDArray[np.bool_]) -> float | None:
    """Return the area under the precision-recall curve, by steps, as in scikit-learn.

    Samples of equal probability form one step, so their order doesn't matter. None if all or no samples have the class,
    or if a probability isn't finite.
    """
    if not held.any() or held.all() or not np.isfinite(probabilities).all():
        return None
    order = np.argsort(-probabilities, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)  # last index of each probability
    right = np.cumsum(held[order])[ends]
    steps = np.diff(right, prepend=0) / right[-1]
    return float(np.sum(steps * (right / (ends + 1))))
