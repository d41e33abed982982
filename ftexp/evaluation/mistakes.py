"""The findings of an evaluation of single labels: which class was taken for which, and the most confident mistakes."""

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

MAX_MISTAKES = 24  # kept, with their pictures
_MAX_PIXELS = 96  # a side of a picture
_MAX_CLASSES = 1000  # classes of a confusion matrix that is written whole: a million numbers


@dataclass(frozen=True)
class Mistake:
    """One sample whose prediction is wrong."""

    confidence: float  # the probability that the model gave to what is wrong about its prediction
    label: tuple[int, ...]  # the sample's class, or its set of classes
    prediction: tuple[int, ...]
    png: bytes  # the picture, as the model sees it


@dataclass
class Part:
    """Mistakes on one rank's part of a split, or on all of it."""

    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)  # how often (label, prediction)
    mistakes: list[Mistake] = field(default_factory=list)  # the surest first


class ClassFindings:
    """Collects on one rank. `to_pixels` turns images as the model gets them back into uint8 rows."""

    def __init__(self, num_classes: int, to_pixels: Callable[[Tensor], UInt8s]) -> None:
        self._num_classes, self._to_pixels = num_classes, to_pixels
        self._pairs: list[Tensor] = []  # label * num_classes + prediction, of each sample
        self._mistakes: list[Mistake] = []

    def add(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Count a batch: images [rows, channels, height, width], labels [rows], logits [rows, num_classes]."""
        predictions = logits.argmax(1)
        confidences = logits.float().softmax(1).gather(1, predictions.unsqueeze(1)).squeeze(1).nan_to_num()
        self._pairs.append((labels * self._num_classes + predictions).cpu())
        wrong = (predictions != labels).nonzero().flatten()
        # stable: samples that tie stay in their order, however many ranks share them
        surest = wrong[confidences[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES]
        pixels = self._to_pixels(images[surest])
        sure, of_label, guesses = (column[surest].tolist() for column in (confidences, labels, predictions))
        found = mistakes_of(sure, [(label,) for label in of_label], [(guess,) for guess in guesses], pixels)
        self._mistakes = surest_of([*self._mistakes, *found])

    def gathered(self) -> Part:
        """Return the mistakes of all ranks on rank 0, and this rank's part on the others; collective."""
        counted = Counter(pair for pairs in self._pairs for pair in pairs.tolist())
        own = Part(Counter({divmod(pair, self._num_classes): count for pair, count in counted.items()}), self._mistakes)
        return _together(gathered(own))

    def report(self, info: DataInfo) -> dict[str, Any]:
        """Return what `evaluation_<split>.json` says, on rank 0; collective."""
        return described(self.gathered(), info.class_names)


def described(part: Part, class_names: list[str]) -> dict[str, Any]:
    """Return entries of `evaluation_<split>.json`; confusion is [label][prediction], null beyond 1,000 classes."""
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
    """Return what `evaluation_<split>.json` says of mistakes, with their pictures."""
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
    """Join the parts of ranks, which hold consecutive stretches of the split, in the order of samples."""
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
    """Return those that are kept, the most confident first; those that tie stay in their order."""
    return sorted(mistakes, key=lambda mistake: -mistake.confidence)[:MAX_MISTAKES]


def _png(pixels: UInt8s) -> bytes:
    """Return [height, width, channels]; a second or fourth channel, Pillow's alpha, isn't shown."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] in (1, 2) else pixels[..., :3])
    picture.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()
