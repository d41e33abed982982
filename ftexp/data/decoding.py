"""What sources of files share: reading rows as Ray tasks, and what becomes of those that can't be read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config import DataConfig
from ftexp.data.order import Int64s
from ftexp.data.sources import UInt8s, make_info
from ftexp.data.splits import BadSample, DataBundle, stratified_split
from ftexp.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Row = tuple[int, int, str, Callable[[], Any]]  # sample, label, where it is, how to get the image
_NUM_BAD_SHOWN = 10


def decode_image(encoded: bytes, size: int, channels: int) -> UInt8s:
    """Decode anything Pillow reads into uint8 [size, size, channels]: shorter side to `size`, centre crop."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded)) as opened:
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


def split_items(config: DataConfig, labels: dict[str, Int64s]) -> dict[str, tuple[str, Int64s]]:
    """{split: (the listed split its samples come from, their positions there)}."""
    missing = [name for name in ("val", "test") if name not in labels]
    fractions = [getattr(config, f"{name}_fraction") for name in missing]
    rest, *cut = stratified_split(labels["train"], fractions, config.split_seed)
    items = {name: (name, np.arange(len(values))) for name, values in labels.items() if name != "train"}
    items |= {name: ("train", part) for name, part in zip(missing, cut, strict=True)}
    return {"train": ("train", rest), **{name: items[name] for name in ("val", "test")}}


def decoded_bundle(
    config: DataConfig,
    raw: dict[str, Any],
    read: Callable[[dict[str, Any]], Iterator[Row]],
    class_names: list[str],
    batch_size: int,
) -> DataBundle:
    """Decode every split, and deal with what can't be decoded as `data.on_bad_sample` says.

    A task decodes `batch_size` rows of `raw`.
    """
    size, channels = config.image_size, config.channels

    def decode(batch: dict[str, Any]) -> pa.Table:
        rows = list(read(batch))
        images, errors = np.zeros((len(rows), size, size, channels), np.uint8), []
        for row, (_, _, where, get) in enumerate(rows):
            try:
                images[row] = _as_image(get(), size, channels)
                errors.append("")
            except Exception as error:  # whatever a codec raises on bytes from outside; recorded, never dropped
                errors.append(f"{where}\n{type(error).__name__}: {error}")
        return {
            "image": images,
            "label": np.array([row[1] for row in rows], np.int64),
            "sample": np.array([row[0] for row in rows], np.int64),
            "error": np.array(errors),
        }

    decoded = {
        split: dataset.map_batches(decode, batch_size=batch_size).materialize() for split, dataset in raw.items()
    }
    bad: list[BadSample] = []
    sizes: dict[str, int] = {}
    for split, dataset in decoded.items():
        errors = [
            error
            for batch in dataset.select_columns(["error"]).iter_batches(batch_format="numpy")
            for error in batch["error"]
        ]
        wrong = [error for error in errors if error]
        bad += [BadSample(*error.split("\n", 1)) for error in wrong]
        sizes[split] = len(errors) - len(wrong)
        if wrong and config.on_bad_sample == "skip":
            decoded[split] = dataset.map_batches(_only_good, batch_size=None).materialize()
    if bad and config.on_bad_sample == "fail":
        shown = [f"{sample.where}: {sample.reason}" for sample in bad[:_NUM_BAD_SHOWN]]
        more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
        raise DataError(
            "\n".join(
                [
                    f"{len(bad)} samples can't be read; mend them, or leave them out with data.on_bad_sample=skip:",
                    *shown,
                    *more,
                ]
            )
        )
    return DataBundle(decoded, make_info(config, class_names, sizes, bad_samples=bad))


def _only_good(batch: dict[str, Any]) -> dict[str, Any]:
    good = batch["error"] == ""
    return {name: values[good] for name, values in batch.items()}


def _as_image(value: Any, size: int, channels: int) -> UInt8s:
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
