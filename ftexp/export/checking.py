"""Comparison of an exported model with the original, on images of the run's own data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ftexp.cli.trained_run import SavedRun
from ftexp.config.schema import MULTI_LABEL, SINGLE_LABEL
from ftexp.config.source_names import can_stream
from ftexp.data.feeds.decoding import decode_samples
from ftexp.data.sources.arrays import UInt8s
from ftexp.errors import DataError
from ftexp.export.formats import Answer
from ftexp.predict.inputs import find_inputs

NOISE = "noise"


@dataclass(frozen=True)
class Samples:
    """Images for the comparison."""

    pixels: UInt8s  # [rows, size, size, channels]
    origin: str  # test, val or train; or noise
    why_noise: str = ""


@dataclass(frozen=True)
class Difference:
    """Difference between two models."""

    largest: float  # largest absolute difference of logits
    largest_logit: float  # for comparison
    num_same: int  # images with the same class or classes by both; for regression, the same values to three decimals


def samples_of(run: SavedRun, num_samples: int) -> Samples:
    """Return images spread evenly over the test split, or over another one if that is empty; noise if none can be read.

    Ray must be running.
    """
    data = dataclasses.replace(run.config.data, on_bad_sample="skip" if can_stream(run.config.data.name) else "fail")
    info, reason = run.info, "no split has an image that can be read"
    for split in ("test", "val", "train"):
        try:
            inputs = find_inputs(data, split, info.class_names)
        except DataError as error:
            reason = str(error).splitlines()[0]
            continue
        chosen = np.unique(np.linspace(0, len(inputs.split) - 1, num_samples).astype(np.int64))
        pixels, outcome = decode_samples(inputs.split, chosen, info.fit)
        readable = np.array([not text for text in outcome.reasons])
        if readable.any():
            return Samples(pixels[readable], split)
    shape = (num_samples, info.image_size, info.image_size, info.channels)
    return Samples(np.random.default_rng(0).integers(0, 256, shape, np.uint8), NOISE, reason)


def compare(original: Answer, exported: Answer, pixels: UInt8s, task: str = SINGLE_LABEL) -> Difference:
    """Compare two models on the same images: the first one alone, then the others, to test other batch sizes too."""
    pieces = [piece for piece in (pixels[:1], pixels[1:]) if len(piece)]
    one, other = (np.concatenate([answer(piece) for piece in pieces]) for answer in (original, exported))
    return Difference(
        largest=float(np.abs(one - other).max()),
        largest_logit=float(np.abs(one).max()),
        num_same=int((_answers(one, task) == _answers(other, task)).all(1).sum()),
    )


def _answers(outputs: npt.NDArray[np.float32], task: str) -> npt.NDArray[Any]:
    """Return a model's answer for each image, [images, n]."""
    if task == SINGLE_LABEL:
        classes: npt.NDArray[Any] = outputs.argmax(1)[:, None]
        return classes
    found: npt.NDArray[Any] = outputs > 0 if task == MULTI_LABEL else outputs.round(3)
    return found
