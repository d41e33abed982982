"""Whether an exported model says what the original says, on images of the run's own data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ftexp.cli.trained_run import SavedRun
from ftexp.config.source_names import can_stream
from ftexp.data.feeds.decoding import decode_samples
from ftexp.data.sources.arrays import UInt8s
from ftexp.errors import DataError
from ftexp.exporting.formats import Answer
from ftexp.predicting.inputs import find_inputs

NOISE = "noise"


@dataclass(frozen=True)
class Samples:
    """Images to compare on."""

    pixels: UInt8s  # [rows, size, size, channels]
    origin: str  # test, val or train; or noise
    why_noise: str = ""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart."""

    largest: float  # of the logits, absolute
    largest_logit: float  # for scale
    num_same: int  # images of which both say the same class


def samples_of(run: SavedRun, num_samples: int) -> Samples:
    """Images of the test split, or of another if that is empty, spread evenly over it; noise if none can be read.

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


def compare(original: Answer, exported: Answer, pixels: UInt8s) -> Difference:
    """Ask both for the same images: the first by itself, and then the others, so that the batch is seen to be free."""
    pieces = [piece for piece in (pixels[:1], pixels[1:]) if len(piece)]
    one, other = (np.concatenate([answer(piece) for piece in pieces]) for answer in (original, exported))
    return Difference(
        largest=float(np.abs(one - other).max()),
        largest_logit=float(np.abs(one).max()),
        num_same=int((one.argmax(1) == other.argmax(1)).sum()),
    )
