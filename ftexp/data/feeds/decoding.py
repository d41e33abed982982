"""Decoding as Ray tasks, and what becomes of samples that can't be read."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
from PIL import Image, UnidentifiedImageError
from ray.data import TaskPoolStrategy

from ftexp.config.schema import DataConfig
from ftexp.data.augment.picture import PictureAugment
from ftexp.data.cropping import Fit, fitted
from ftexp.data.info import BadSample, DataInfo, IndexedSplit
from ftexp.data.order import Int64s
from ftexp.data.sources.arrays import UInt8s
from ftexp.errors import DataError

if TYPE_CHECKING:
    from ray.data import Dataset

_NUM_BAD_SHOWN = 10

T = TypeVar("T")


def num_pixels(value: Any) -> int:
    """Return how many pixels an image has, as a source gives it; of an encoded one, only the head is read."""
    encoded: Any = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        return int(np.prod(np.shape(encoded)[:2]))
    with _opened(encoded) as image:
        return image.width * image.height


def open_picture(encoded: bytes, channels: int) -> Image.Image:
    """Decode anything Pillow reads, in its own size."""
    with _opened(encoded) as opened:
        readable = opened if opened.mode[0] not in "IF" else Image.fromarray(_high_bytes(opened))
        return readable.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # Pillow's own words name an address in memory, another one each time
        raise UnidentifiedImageError("no format that Pillow reads") from None


def _high_bytes(image: Any) -> UInt8s:
    """16-bit grey as 8-bit; Pillow's own conversion cuts everything above 255 off."""
    if not image.mode.startswith("I;16"):
        raise ValueError(f"pixels of Pillow's mode {image.mode}, whose range isn't known")
    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


@dataclass(frozen=True)
class Decode:
    """A map stage of Ray Data: {"sample": [n]} -> image, label, sample, and an error where there is no image.

    With `augment`, which also needs {"position": [n]}, an image is what the step at its position trains on. Channels
    then come before height and width, as a training process wants them.
    """

    split: IndexedSplit
    fit: Fit
    augment: PictureAugment | None = None

    def __call__(self, batch: dict[str, Int64s]) -> dict[str, Any]:
        """Decode a block of samples; `error` is "" or "where\\nwhat", and the image then black."""
        samples = batch["sample"]
        images, outcome = decode_samples(self.split, samples, self.fit, self.augment, batch.get("position"))
        if self.augment is not None:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        _, labels = self.split.table.get()
        return {"image": images, "label": labels[samples], "sample": samples, "error": np.array(outcome.errors)}


class Outcome(NamedTuple):
    """Where samples are, and why some can't be read."""

    places: list[str]
    reasons: list[str]  # why one can't be read; "": it can

    @property
    def errors(self) -> list[str]:
        """Both in one, for a column: see `bad_sample`."""
        return [f"{where}\n{reason}" if reason else "" for where, reason in zip(*self, strict=True)]


def each_sample(
    split: IndexedSplit, samples: Int64s, read: Callable[[Any], T], outcome: Outcome
) -> Iterator[tuple[int, T]]:
    """Yield each sample's row with what `read` makes of it, but for those that can't be read; add to `outcome`."""
    items, _ = split.table.get()
    for row, (where, get) in enumerate(split.read(items[samples])):
        outcome.places.append(where)
        try:
            found = read(get())
        except Exception as error:  # whatever a codec raises on bytes from outside; recorded, never dropped
            outcome.reasons.append(f"{type(error).__name__}: {error}")
            continue
        outcome.reasons.append("")
        yield row, found


def decode_samples(
    split: IndexedSplit,
    samples: Int64s,
    fit: Fit,
    augment: PictureAugment | None = None,
    positions: Int64s | None = None,
) -> tuple[UInt8s, Outcome]:
    """Decode samples into uint8 [rows, size, size, channels]; what can't be read is black.

    Whole pictures are fitted, or else changed by `augment` as `positions` say.
    """
    images = np.zeros((len(samples), fit.size, fit.size, fit.channels), np.uint8)
    outcome = Outcome([], [])
    if augment is None:
        for row, image in each_sample(split, samples, functools.partial(as_image, fit=fit), outcome):
            images[row] = image
        return images, outcome
    assert positions is not None, "they are asked for along with the samples"
    for row, picture in each_sample(split, samples, functools.partial(as_picture, fit=fit), outcome):
        images[row] = augment(picture, int(positions[row]))  # an error here is a bug, not a bad sample
    return images, outcome


def decoding(
    split: IndexedSplit,
    info: DataInfo,
    units: Sequence[Mapping[str, Int64s]],
    concurrency: int | None = None,
    stage: Callable[[IndexedSplit, Fit], Callable[[dict[str, Int64s]], Any]] = Decode,
) -> Dataset:
    """A Ray Dataset that decodes samples on any node: a task and a block for each unit, in the order of `units`.

    units: the columns that `stage` takes, "sample" at least.
    stage: makes the map stage of a split, and of how it is fitted.
    """
    most = min(concurrency, len(units)) if concurrency is not None else None  # Ray warns of tasks that can't all begin
    tables = [pa.table(dict(unit)) for unit in units]
    decode = stage(split, info.fit)
    return ray.data.from_arrow(tables).map_batches(decode, batch_size=None, compute=TaskPoolStrategy(size=most))


def bad_sample(error: str) -> BadSample:
    """What an entry of `Decode`'s column `error` says."""
    return BadSample(*error.split("\n", 1))


def refuse_bad(config: DataConfig, bad: list[BadSample]) -> None:
    """DataError that names samples that can't be read, unless they shall be skipped."""
    if not bad or config.on_bad_sample == "skip":
        return
    shown = [f"{sample.where}: {sample.reason}" for sample in bad[:_NUM_BAD_SHOWN]]
    more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
    count = f"{len(bad)} samples" if len(bad) > 1 else "1 sample"
    raise DataError(
        "\n".join([f"{count} can't be read; mend them, or leave them out with data.on_bad_sample=skip:", *shown, *more])
    )


def as_image(value: Any, fit: Fit) -> UInt8s:
    """An image as uint8 [size, size, channels], from encoded bytes, {"bytes": ...} or an array."""
    image = fitted(as_picture(value, fit), fit)
    return np.asarray(image, np.uint8).reshape(fit.size, fit.size, fit.channels)


def as_picture(value: Any, fit: Fit) -> Image.Image:
    """An image as Pillow has it, of its own size; arrays must be of the final one."""
    if isinstance(value, Image.Image):
        return value
    size, channels = fit.size, fit.channels
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return open_picture(value, channels)
    if value is None:
        raise ValueError("no image")
    pixels = np.asarray(value)
    if pixels.shape == (size, size) and channels == 1:
        pixels = pixels[..., None]
    if pixels.shape != (size, size, channels):
        raise ValueError(f"an array of shape {pixels.shape}, not {(size, size, channels)}")
    if pixels.dtype.kind not in "iu":  # fractions of 1 would all become 0
        raise ValueError(f"pixels of type {pixels.dtype}, not whole numbers from 0 to 255")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("pixel values outside 0..255")
    pixels = pixels.astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
