"""A data set that is decoded once, into Ray's object store.

If a run augments single pictures, the training pictures are stored as pixels, at their own size if they are cropped.
Tasks read them like files, so a cached run differs from a streamed one only in where pictures come from.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data

from ftexp.config.schema import AugmentConfig, DataConfig
from ftexp.data.cropping import Fit
from ftexp.data.decoder import Decoding, Picture, UInt8s, on_one_thread, size_of
from ftexp.data.feeds.decoding import (
    Decode,
    Outcome,
    Sample,
    Stored,
    bad_sample,
    decoding,
    each_sample,
    num_pixels,
    refuse_bad,
)
from ftexp.data.info import DataBundle, IndexedSplit, Raw, Reader
from ftexp.data.listing import Listing
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.data.sources.arrays import make_info
from ftexp.data.targets import Labels, label_column, label_rows

if TYPE_CHECKING:
    from ray.data import Dataset


_FILES = 64  # files decoded by one task
_PROBED = 16  # pictures whose size is read to estimate the memory of all


def decoded_bundle(
    config: DataConfig, listing: Listing, augment: AugmentConfig, runtime_env: Mapping[str, Any] | None = None
) -> DataBundle:
    """Decode every split into the object store; samples that can't be decoded are handled by `data.on_bad_sample`.

    augment: determines the form in which training pictures are stored. runtime_env: see `decoding`.
    """
    splits = listing.splits(config, listing.readers)
    info = make_info(config, listing.class_names, {name: split.num_samples for name, split in splits.items()})
    stages: dict[str, Any] = dict.fromkeys(splits, Decode)
    if augment.changes_pictures:
        stages["train"] = functools.partial(DecodePictures, keep_size=augment.crop != "none")
    decoded = {
        name: decoding(split, info, _whole_blocks(split), config.decode_cpus, stages[name], runtime_env).materialize()
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
            if stages[name] is Decode:
                decoded[name] = dataset.map_batches(_only_good, batch_size=None).materialize()
            if name == "train" and blocks is not None:
                blocks = blocks - np.histogram(sorted(wrong), np.concatenate([[0], np.cumsum(blocks)]))[0]
    refuse_bad(config, bad)
    datasets = {name: decoded.get(name) or ray.data.from_items([]) for name in splits}
    pictures = None
    if augment.changes_pictures and "train" in decoded:
        pictures = stored_pictures(datasets.pop("train"), info.channels, is_final=augment.crop == "none")
    info = make_info(config, listing.class_names, sizes, **listing.facts(config, splits) | {"bad_samples": bad})
    return DataBundle(datasets, info, splits, blocks, pictures=pictures)


def _whole_blocks(split: IndexedSplit) -> list[dict[str, Int64s]]:
    """Return all samples in order, in units of one block, which may be large, or of 64 files."""
    sizes = split.block_sizes if split.block_sizes is not None else np.full(-(-len(split) // _FILES), _FILES)
    samples = np.arange(len(split))
    return [{"sample": unit} for unit in np.split(samples, np.cumsum(sizes)[:-1]) if len(unit)]


def _only_good(batch: dict[str, Any]) -> dict[str, Any]:
    good = batch["error"] == ""
    return {name: values[good] for name, values in batch.items()}


@dataclass(frozen=True)
class DecodePictures:
    """A map stage of Ray Data: {"sample": [n]} -> pixels, height, label, sample, error ("" if decoded)."""

    split: IndexedSplit
    fit: Fit
    keep_size: bool  # False: pictures are fitted to the final size

    def __call__(self, batch: dict[str, Int64s]) -> pa.Table:
        """Decode a block of samples; the column `error` is that of `ftexp.data.feeds.decoding.Decode`."""
        samples = batch["sample"]
        pixels, heights, outcome = [b""] * len(samples), [0] * len(samples), Outcome.of(len(samples))
        with on_one_thread(self.fit.decoding.decoder):
            pictures = each_sample(self.split, samples, self.fit, not self.keep_size, self._finish, outcome)
            for row, picture in pictures:
                pixels[row], heights[row] = picture.tobytes(), size_of(picture)[1]
        _, labels = self.split.table.get()
        return _table(pixels, heights, labels[samples], samples, outcome.errors)

    def _finish(self, sample: Sample) -> Picture:
        return sample.picture if self.keep_size else sample.image(self.fit)


def _of_arrays(batch: dict[str, Any]) -> pa.Table:
    """Return a block of an in-memory source in the format of `DecodePictures`."""
    pixels, heights = [image.tobytes() for image in batch["image"]], [len(image) for image in batch["image"]]
    return _table(pixels, heights, batch["label"], batch["sample"], [""] * len(pixels))


def mean_pixels(config: DataConfig, listing: Listing) -> int:
    """Return the mean number of pixels of a few training pictures; if none can be read, that of the final size."""
    reader = listing.single_readers.get("train", listing.readers["train"])
    num_items = len(listing.labels["train"])
    items = np.arange(num_items)[:: max(1, num_items // _PROBED)][:_PROBED]
    decoding = Decoding(config.decoder_name, config.decode_size)
    found: list[int] = ray.get(ray.remote(_sizes).remote(reader, items, decoding))
    return sum(found) // len(found) if found else config.image_size**2


def _sizes(reader: Reader, items: Int64s, decoding: Decoding) -> list[int]:
    sizes = []
    for item in items:
        for _, get in reader(np.array([item])):
            with contextlib.suppress(Exception):  # decoding reports it later
                sizes.append(num_pixels(get(), decoding))
    return sizes


def _table(
    pixels: Sequence[bytes], heights: Sequence[int], labels: Labels, samples: Int64s, errors: Sequence[str]
) -> pa.Table:
    return pa.table(
        {
            "pixels": pa.array(pixels, pa.large_binary()),
            "height": pa.array(heights, pa.int64()),
            "label": label_column(labels),
            "sample": samples,
            "error": errors,
        }
    )


def array_pictures(dataset: Dataset, channels: int) -> IndexedSplit:
    """Return a cached split, with the columns of `DataBundle`, as a split of pictures."""
    return stored_pictures(dataset.map_batches(_of_arrays, batch_size=None).materialize(), channels, is_final=True)


def stored_pictures(dataset: Dataset, channels: int, is_final: bool) -> IndexedSplit:
    """Return a split with the decoded samples in materialised blocks of `DecodePictures`, in the samples' order.

    is_final: whether the pictures have the final size.
    """
    refs = dataset.to_arrow_refs()
    facts = ray.remote(_facts)
    blocks = ray.get([facts.remote(ref) for ref in refs])
    samples, labels, good = (np.concatenate(column) for column in zip(*blocks, strict=True))
    in_order = np.flatnonzero(good)[np.argsort(samples[good], kind="stable")]  # blocks may come in any order
    first_items = np.cumsum([0, *(len(block[0]) for block in blocks)])[:-1]
    reader = StoredPictures(Shared((first_items, refs)), channels, is_final)
    return IndexedSplit(len(in_order), reader, Shared((in_order, labels[in_order])), None)


def _facts(table: pa.Table) -> tuple[Int64s, Labels, Any]:
    good = np.array([not error for error in table["error"].to_pylist()], bool)
    return table["sample"].to_numpy(), label_rows(table["label"]), good


@dataclass(frozen=True)
class StoredPictures:
    """Reads pictures from blocks in the object store."""

    blocks: Shared[tuple[Int64s, list[ray.ObjectRef]]]  # each block's first item, and its reference
    channels: int
    is_final: bool

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield each item's number as its location, and a function that returns the picture."""
        first_items, refs = self.blocks.get()
        numbers = np.searchsorted(first_items, items, side="right") - 1
        wanted = np.unique(numbers).tolist()
        blocks = dict(zip(wanted, map(_Block.of, ray.get([refs[number] for number in wanted])), strict=True))
        for item, number in zip(items.tolist(), numbers.tolist(), strict=True):
            row = item - int(first_items[number])
            yield f"cached image {item}", functools.partial(self._picture, blocks[number], row)

    def _picture(self, block: _Block, row: int) -> Stored:
        flat = block.pixels[block.ends[row] : block.ends[row + 1]]
        return Stored(flat.reshape(block.heights[row], -1, self.channels), self.is_final)


class _Block(NamedTuple):
    """The pictures of a block as views of its buffers: reading an item through Arrow takes many times as long."""

    pixels: UInt8s  # pixels of all pictures, one after another
    ends: Int64s  # start of the first picture, then the end of each
    heights: Int64s

    @classmethod
    def of(cls, table: pa.Table) -> _Block:
        """Return views of a table made by `DecodePictures`."""
        column = table["pixels"]
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        _, ends, pixels = column.buffers()
        first, last = column.offset, column.offset + len(column) + 1
        return cls(
            np.frombuffer(pixels, np.uint8), np.frombuffer(ends, np.int64)[first:last], table["height"].to_numpy()
        )
