"""Decoding as Ray tasks, and what becomes of samples that can't be read."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
from ray.data import TaskPoolStrategy

from ftexp.config.schema import DataConfig
from ftexp.data.info import BadSample, DataBundle, DataInfo, IndexedSplit
from ftexp.data.listing import Listing
from ftexp.data.order import Int64s
from ftexp.data.sources.arrays import UInt8s, make_info
from ftexp.errors import DataError

if TYPE_CHECKING:
    from ray.data import Dataset

_NUM_BAD_SHOWN = 10
_FILES = 64  # decoded by one task


def decode_image(encoded: bytes, size: int, channels: int) -> UInt8s:
    """Decode anything Pillow reads into uint8 [size, size, channels]: shorter side to `size`, centre crop."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        file = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # Pillow's own words name an address in memory, another one each time
        raise UnidentifiedImageError("no format that Pillow reads") from None
    with file as opened:
        readable = opened if opened.mode[0] not in "IF" else Image.fromarray(_high_bytes(opened))
        image = readable.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(size, size, channels)


def _high_bytes(image: Any) -> UInt8s:
    """16-bit grey as 8-bit; Pillow's own conversion cuts everything above 255 off."""
    if not image.mode.startswith("I;16"):
        raise ValueError(f"pixels of Pillow's mode {image.mode}, whose range isn't known")
    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


@dataclass(frozen=True)
class Decode:
    """A map stage of Ray Data: {"sample": [n]} -> image, label, sample, and an error where there is no image."""

    split: IndexedSplit
    size: int
    channels: int

    def __call__(self, batch: dict[str, Int64s]) -> dict[str, Any]:
        """Decode a block of samples; `error` is "" or "where\\nwhat", and the image then black."""
        samples = batch["sample"]
        images, places, reasons = decode_samples(self.split, samples, self.size, self.channels)
        errors = [f"{where}\n{reason}" if reason else "" for where, reason in zip(places, reasons, strict=True)]
        _, labels = self.split.table.get()
        return {"image": images, "label": labels[samples], "sample": samples, "error": np.array(errors)}


def decode_samples(
    split: IndexedSplit, samples: Int64s, size: int, channels: int
) -> tuple[UInt8s, list[str], list[str]]:
    """Decode samples: pixels, where each is, and why it can't be read: "" if it can; it is black otherwise."""
    items, _ = split.table.get()
    images = np.zeros((len(samples), size, size, channels), np.uint8)
    places, reasons = [], []
    for row, (where, get) in enumerate(split.read(items[samples])):
        places.append(where)
        try:
            images[row] = as_image(get(), size, channels)
            reasons.append("")
        except Exception as error:  # whatever a codec raises on bytes from outside; recorded, never dropped
            reasons.append(f"{type(error).__name__}: {error}")
    return images, places, reasons


def decoding(
    split: IndexedSplit,
    info: DataInfo,
    units: list[Int64s],
    concurrency: int | None = None,
    stage: Callable[[IndexedSplit, int, int], Callable[[dict[str, Int64s]], dict[str, Any]]] = Decode,
) -> Dataset:
    """A Ray Dataset that decodes samples on any node: a task and a block for each unit, in the order of `units`.

    stage: makes the map stage of a split, a size and a number of channels.
    """
    import pyarrow as pa

    most = min(concurrency, len(units)) if concurrency is not None else None  # Ray warns of tasks that can't all begin
    tables = [pa.table({"sample": unit}) for unit in units]
    decode = stage(split, info.image_size, info.channels)
    return ray.data.from_arrow(tables).map_batches(decode, batch_size=None, compute=TaskPoolStrategy(size=most))


def decoded_bundle(config: DataConfig, listing: Listing) -> DataBundle:
    """Decode every split into the object store, and deal with what can't be decoded as `data.on_bad_sample` says."""
    splits = listing.splits(config, listing.readers)
    info = make_info(config, listing.class_names, {name: split.num_samples for name, split in splits.items()})
    decoded = {
        name: decoding(split, info, _whole_blocks(split), config.decode_cpus).materialize()
        for name, split in splits.items()
        if len(split)
    }
    bad = list(listing.bad)
    sizes, blocks = dict(info.num_samples), splits["train"].block_sizes
    for name, dataset in decoded.items():
        rows = list(dataset.select_columns(["sample", "error"]).iter_batches(batch_size=None, batch_format="numpy"))
        wrong = {int(n): error for row in rows for n, error in zip(row["sample"], row["error"], strict=True) if error}
        bad += [bad_sample(wrong[number]) for number in sorted(wrong)]
        sizes[name] -= len(wrong)
        if wrong and config.on_bad_sample == "skip":
            decoded[name] = dataset.map_batches(_only_good, batch_size=None).materialize()
            if name == "train" and blocks is not None:
                blocks = blocks - np.histogram(sorted(wrong), np.concatenate([[0], np.cumsum(blocks)]))[0]
    refuse_bad(config, bad)
    datasets = {name: decoded.get(name) or ray.data.from_items([]) for name in splits}
    info = make_info(config, listing.class_names, sizes, **listing.facts(splits) | {"bad_samples": bad})
    return DataBundle(datasets, info, splits, blocks)


def _whole_blocks(split: IndexedSplit) -> list[Int64s]:
    """All samples in order: a unit for each block, since any may be large, or 64 files."""
    sizes = split.block_sizes if split.block_sizes is not None else np.full(-(-len(split) // _FILES), _FILES)
    samples = np.arange(len(split))
    return [unit for unit in np.split(samples, np.cumsum(sizes)[:-1]) if len(unit)]


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


def _only_good(batch: dict[str, Any]) -> dict[str, Any]:
    good = batch["error"] == ""
    return {name: values[good] for name, values in batch.items()}


def as_image(value: Any, size: int, channels: int) -> UInt8s:
    """An image as uint8 [size, size, channels], from encoded bytes, {"bytes": ...} or an array."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return decode_image(value, size, channels)
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
    return pixels.astype(np.uint8)
