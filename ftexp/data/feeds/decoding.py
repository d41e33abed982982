"""Decoding in Ray tasks, and the handling of samples that can't be read."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data import TaskPoolStrategy

from ftexp.config.schema import DataConfig
from ftexp.counting import counted
from ftexp.data.augment.picture import PictureAugment
from ftexp.data.cropping import Fit, fitted
from ftexp.data.decoder import Decoding, Picture, Traits, UInt8s, on_one_thread, pixels_of
from ftexp.data.info import BadSample, DataInfo, IndexedSplit
from ftexp.data.order import Int64s
from ftexp.errors import DataError

if TYPE_CHECKING:
    from ray.data import Dataset

PARTS = ("read", "decode", "crop", "augment")  # timed parts of making a sample; crop includes fitting
_NUM_BAD_SHOWN = 10

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


def num_pixels(value: Any, decoding: Decoding) -> int:
    """Return the number of pixels of a source's image, decoded for cropping; reads only an encoded image's header."""
    encoded: Any = value.get("bytes") if isinstance(value, dict) else value
    return decoding.num_pixels(encoded) if isinstance(encoded, bytes) else int(np.prod(np.shape(encoded)[:2]))


@dataclass(frozen=True)
class Decode:
    """A map stage of Ray Data: {"sample": [n]} -> image, label, sample, error, traits, cost.

    error: "" if the sample was decoded; traits: see `Traits`; cost: milliseconds for each of PARTS.

    With `augment`, which also needs {"position": [n]}, an image is augmented for the training step at its position. Its
    channels then come before height and width, as training needs them.
    """

    split: IndexedSplit
    fit: Fit
    augment: PictureAugment | None = None

    def __call__(self, batch: dict[str, Int64s]) -> dict[str, Any]:
        """Decode a block of samples. `error` is "" or "location\\nreason"; in the latter case the image is black."""
        samples = batch["sample"]
        images, outcome = decode_samples(self.split, samples, self.fit, self.augment, batch.get("position"))
        if self.augment is not None:
            images = images.transpose(0, 3, 1, 2)
        _, labels = self.split.table.get()
        columns = {"traits": np.array(outcome.traits, np.uint8), "cost": outcome.costs}
        return {
            "image": images,
            "label": labels[samples],
            "sample": samples,
            "error": np.array(outcome.errors),
            **columns,
        }


@dataclass(frozen=True)
class Outcome:
    """Result of decoding: the samples' locations, errors, traits and times."""

    places: list[str]  # locations of the samples
    reasons: list[str]  # why a sample can't be read; "": it was read
    traits: list[Traits]
    costs: Floats  # [samples, PARTS], milliseconds; 0 for samples that can't be read

    @classmethod
    def of(cls, num_samples: int) -> Outcome:
        """Return an empty outcome for this number of samples."""
        return cls([], [], [], np.zeros((num_samples, len(PARTS)), np.float32))

    @property
    def errors(self) -> list[str]:
        """Location and reason of each sample in one string, for a column; `bad_sample` parses it."""
        return [f"{where}\n{why}" if why else "" for where, why in zip(self.places, self.reasons, strict=True)]


def each_sample(
    split: IndexedSplit,
    samples: Int64s,
    fit: Fit,
    is_whole: bool,
    finish: Callable[[Sample], T],
    outcome: Outcome,
) -> Iterator[tuple[int, T]]:
    """Yield (row, result of `finish`) for each sample that can be read, and record all samples in `outcome`.

    is_whole: see `as_sample`.
    """
    items, _ = split.table.get()
    for row, (where, get) in enumerate(split.read(items[samples])):
        outcome.places.append(where)
        laps = [time.perf_counter()]
        try:
            value = get()
            laps.append(time.perf_counter())
            sample = as_sample(value, fit, is_whole)
            laps.append(time.perf_counter())
            found = finish(sample)
        except Exception as error:  # whatever a codec raises on invalid bytes; recorded, never dropped
            outcome.reasons.append(f"{type(error).__name__}: {error}")
            outcome.traits.append(Traits(0))
            continue
        laps.append(time.perf_counter())
        outcome.costs[row, : len(laps) - 1] = _between(laps)
        outcome.reasons.append("")
        outcome.traits.append(sample.traits)
        yield row, found


def _between(laps: Sequence[float]) -> list[float]:
    return [1000 * (end - start) for start, end in itertools.pairwise(laps)]


def decode_samples(
    split: IndexedSplit,
    samples: Int64s,
    fit: Fit,
    augment: PictureAugment | None = None,
    positions: Int64s | None = None,
) -> tuple[UInt8s, Outcome]:
    """Decode samples into uint8 [rows, size, size, channels]; samples that can't be read are black.

    Without `augment`, whole pictures are fitted. With it, pictures are augmented for their `positions`; in memory, the
    channels then come before height and width.
    """
    shape = (len(samples), fit.size, fit.size, fit.channels)
    outcome, is_whole = Outcome.of(len(samples)), augment is None or not augment.crops
    with on_one_thread(fit.decoding.decoder):
        if augment is None:
            images = np.zeros(shape, np.uint8)
            for row, image in each_sample(split, samples, fit, is_whole, lambda sample: sample.image(fit), outcome):
                images[row] = image
            return images, outcome
        assert positions is not None, "they are asked for along with the samples"
        images = np.zeros([shape[axis] for axis in (0, 3, 1, 2)], np.uint8).transpose(0, 2, 3, 1)
        for row, sample in each_sample(split, samples, fit, is_whole, lambda sample: sample, outcome):
            laps = [time.perf_counter()]
            try:
                augment.seed(int(positions[row]))
                pixels = augment.cropped(sample.picture, sample.is_final)
                laps.append(time.perf_counter())
                images[row] = augment.changed(pixels)
            except Exception as error:  # a bug, not a bad sample
                where, reason = outcome.places[row], f"{type(error).__name__}: {error}"
                raise RuntimeError(f"{where}: augmenting it for position {positions[row]} failed: {reason}") from error
            laps.append(time.perf_counter())
            outcome.costs[row, -2:] = _between(laps)
    return images, outcome


def decoding(
    split: IndexedSplit,
    info: DataInfo,
    units: Sequence[Mapping[str, Int64s]],
    concurrency: int | None = None,
    stage: Callable[[IndexedSplit, Fit], Callable[[dict[str, Int64s]], Any]] = Decode,
    runtime_env: Mapping[str, Any] | None = None,
) -> Dataset:
    """Return a Ray Dataset that decodes samples on any node, with one task and one block per unit, in order.

    units: the columns that `stage` reads, at least "sample".
    stage: builds the map stage from a split and its `Fit`.
    runtime_env: runtime_env of the tasks; None: that of this process.
    """
    # Ray warns if not all tasks can start
    max_tasks = min(concurrency, len(units)) if concurrency is not None else None
    tables = [pa.table(dict(unit)) for unit in units]
    decode = stage(split, info.fit)
    options = {"runtime_env": dict(runtime_env)} if runtime_env else {}
    return ray.data.from_arrow(tables).map_batches(
        decode, batch_size=None, compute=TaskPoolStrategy(size=max_tasks), **options
    )


def bad_sample(error: str) -> BadSample:
    """Return the bad sample that an entry in `Decode`'s column `error` describes."""
    return BadSample(*error.split("\n", 1))


def refuse_bad(config: DataConfig, bad: list[BadSample]) -> None:
    """Raise DataError, which names samples that can't be read, unless data.on_bad_sample=skip."""
    if not bad or config.on_bad_sample == "skip":
        return
    shown = [f"{sample.where}: {sample.reason}" for sample in bad[:_NUM_BAD_SHOWN]]
    more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
    count = counted(len(bad), "sample")
    raise DataError(
        "\n".join([f"{count} can't be read; fix them, or exclude them with data.on_bad_sample=skip:", *shown, *more])
    )


@dataclass(frozen=True)
class Stored:
    """A decoded picture in memory, [height, width, channels]."""

    pixels: UInt8s
    is_final: bool  # whether it has the final size


class Sample(NamedTuple):
    """A source's image, decoded."""

    picture: Picture
    is_final: bool  # whether it already has the final size, so that it needs no fitting
    traits: Traits

    def image(self, fit: Fit) -> UInt8s:
        """Return the whole image at the model's input size, [size, size, channels]."""
        return pixels_of(self.picture) if self.is_final else fitted(self.picture, fit)


def as_image(value: Any, fit: Fit) -> UInt8s:
    """Convert encoded bytes, {"bytes": ...} or an array to an image, uint8 [size, size, channels]."""
    return as_sample(value, fit).image(fit)


def as_sample(value: Any, fit: Fit, is_whole: bool = True) -> Sample:
    """Decode a source's image; arrays must have the final size.

    is_whole: the image will be fitted as a whole, so it may be decoded at a smaller size; False: it will be cropped.
    """
    if isinstance(value, Stored):
        return Sample(fit.decoding.picture(value.pixels), value.is_final, Traits(0))
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        picture, traits = fit.decoding(value, fit.channels, fit.side if is_whole else None)
        return Sample(picture, False, traits)
    if value is None:
        raise ValueError("no image")
    return Sample(fit.decoding.picture(_checked(value, fit)), True, Traits(0))


def _checked(value: Any, fit: Fit) -> UInt8s:
    """Return the value as uint8 pixels; ValueError unless it is an array of the final size with values 0 to 255."""
    size, channels = fit.size, fit.channels
    pixels = np.asarray(value)
    if pixels.shape == (size, size) and channels == 1:
        pixels = pixels[..., None]
    if pixels.shape != (size, size, channels):
        raise ValueError(f"an array of shape {pixels.shape}, not {(size, size, channels)}")
    if pixels.dtype.kind not in "iu":  # values between 0 and 1 would all become 0
        raise ValueError(f"pixels of type {pixels.dtype}, not whole numbers from 0 to 255")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("pixel values outside 0..255")
    return pixels.astype(np.uint8)
