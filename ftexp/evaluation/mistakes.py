"""Findings for data.task=single_label: the confusion of classes, and the most confident mistakes."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from ftexp.data.info import DataInfo
from ftexp.data.sources.arrays import UInt8s
from ftexp.evaluation.gathering import gathered

MAX_MISTAKES = 24  # maximum number of mistakes that are kept, with their pictures
_MAX_PIXELS = 96  # maximum side of a picture
_MAX_CLASSES = 1000  # maximum number of classes for which the confusion matrix is written: a million numbers


@dataclass(frozen=True)
class Mistake:
    """One sample whose prediction is wrong."""

    confidence: float  # probability that the model gave to the wrong part of its prediction
    label: tuple[int, ...]  # the sample's class, or its set of classes
    prediction: tuple[int, ...]
    png: bytes  # the model's input image


@dataclass
class Part:
    """Findings on one rank's part of a split, or on the whole split."""

    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)  # (label, prediction) -> number of samples
    mistakes: list[Mistake] = field(default_factory=list)  # the most confident first


class ClassFindings:
    """Findings of single_label. to_pixels: converts normalised images back to uint8 rows."""

    def __init__(self, num_classes: int, to_pixels: Callable[[Tensor], UInt8s]) -> None:
        self._num_classes, self._to_pixels = num_classes, to_pixels
        self._pairs: list[Tensor] = []  # label * num_classes + prediction for each sample, by batch
        self._mistakes: list[Mistake] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Count a batch: images [rows, channels, height, width], labels [rows], logits [rows, num_classes]."""
        predictions = logits.argmax(1)
        confidences = logits.float().softmax(1).gather(1, predictions.unsqueeze(1)).squeeze(1).nan_to_num()
        self._pairs.append((labels * self._num_classes + predictions).cpu())
        wrong = (predictions != labels).nonzero().flatten()
        # stable: ties stay in the order of the samples, for any number of ranks
        surest = wrong[confidences[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES]
        pixels = self._to_pixels(images[surest])
        sure, of_label, guesses = (column[surest].tolist() for column in (confidences, labels, predictions))
        found = mistakes_of(sure, [(label,) for label in of_label], [(guess,) for guess in guesses], pixels)
        self._mistakes = surest_of([*self._mistakes, *found])

    def gathered(self) -> Part:
        """Return the findings of all ranks on rank 0, and only this rank's on other ranks; collective."""
        counted = Counter(pair for pairs in self._pairs for pair in pairs.tolist())
        own = Part(Counter({divmod(pair, self._num_classes): count for pair, count in counted.items()}), self._mistakes)
        return _together(gathered(own))

    def report(self, info: DataInfo) -> dict[str, Any]:
        """Return the content of `evaluation_<split>.json`, on rank 0; collective."""
        return described(self.gathered(), info.class_names)


def described(part: Part, class_names: list[str]) -> dict[str, Any]:
    """Return the content of `evaluation_<split>.json`; confusion is [label][prediction], null above 1,000 classes."""
    num_classes = len(class_names)
    confusion = None
    if num_classes <= _MAX_CLASSES:
        confusion = [[part.pairs[label, guess] for guess in range(num_classes)] for label in range(num_classes)]
    of_label, of_prediction = Counter[int](), Counter[int]()
    for (label, guess), count in part.pairs.items():
        of_label[label] += count
        of_prediction[guess] += count
    return {
        "num_samples": part.pairs.total(),
        "classes": [
            {
                "class": name,
                "num_samples": of_label[number],
                "recall": _share(part.pairs[number, number], of_label[number]),
                "precision": _share(part.pairs[number, number], of_prediction[number]),
            }
            for number, name in enumerate(class_names)
        ],
        "confusion": confusion,
        "mistakes": described_mistakes(part.mistakes, class_names),
    }


def described_mistakes(mistakes: Sequence[Mistake], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the entries of `evaluation_<split>.json` for mistakes, with their pictures."""
    return [
        {
            "label": _named(mistake.label, class_names),
            "prediction": _named(mistake.prediction, class_names),
            "confidence": mistake.confidence,
            "png": base64.b64encode(mistake.png).decode(),
        }
        for mistake in mistakes
    ]


def _named(classes: tuple[int, ...], class_names: Sequence[str]) -> str:
    return ", ".join(class_names[number] for number in classes) or "no class"


def _share(right: int, total: int) -> float | None:
    return right / total if total else None


def _together(parts: list[Part]) -> Part:
    """Join the parts of all ranks in rank order, which is the order of the samples."""
    pairs = Counter[tuple[int, int]]()
    for part in parts:
        pairs.update(part.pairs)
    return Part(pairs, surest_of([mistake for part in parts for mistake in part.mistakes]))


def mistakes_of(
    confidences: Sequence[float],
    labels: Sequence[tuple[int, ...]],
    predictions: Sequence[tuple[int, ...]],
    pixels: UInt8s,
) -> list[Mistake]:
    """Return a mistake for each row of `pixels`, [rows, height, width, channels]."""
    columns = zip(confidences, labels, predictions, map(_png, pixels), strict=True)
    return [Mistake(*values) for values in columns]


def surest_of(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Return the MAX_MISTAKES most confident mistakes, the most confident first; ties keep their order."""
    return sorted(mistakes, key=lambda mistake: -mistake.confidence)[:MAX_MISTAKES]


def _png(pixels: UInt8s) -> bytes:
    """Encode pixels [height, width, channels] as PNG, without a second or fourth channel (alpha in Pillow)."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] in (1, 2) else pixels[..., :3])
    picture.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()
