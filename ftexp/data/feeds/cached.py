"""A data set that is decoded once, into Ray's object store.

A run that changes pictures one by one as it trains has those of train there as pixels, of their own size if they are
cropped. Tasks read them as they would read files, so that a cached run and a streamed one differ in nothing but where
a picture comes from.
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


_FILES = 64  # decoded by one task
_PROBED = 16  # pictures from whose size the memory of all is estimated


def decoded_bundle(
    config: DataConfig, listing: Listing, augment: AugmentConfig, runtime_env: Mapping[str, Any] | None = None
) -> DataBundle:
    """Decode every split into the object store, and deal with what can't be decoded as `data.on_bad_sample` says.

    augment: decides what is kept of train's pictures. runtime_env: see `decoding`.
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
    """Return all samples in order: a unit for each block, since any may be large, or 64 files."""
    sizes = split.block_sizes if split.block_sizes is not None else np.full(-(-len(split) // _FILES), _FILES)
    samples = np.arange(len(split))
    return [{"sample": unit} for unit in np.split(samples, np.cumsum(sizes)[:-1]) if len(unit)]


def _only_good(batch: dict[str, Any]) -> dict[str, Any]:
    good = batch["error"] == ""
    return {name: values[good] for name, values in batch.items()}


@dataclass(frozen=True)
class DecodePictures:
    """A map stage of Ray Data: {"sample": [n]} -> pixels, height, label, sample, and an error where there are none."""

    split: IndexedSplit
    fit: Fit
    keep_size: bool  # else pictures are fitted

    def __call__(self, batch: dict[str, Int64s]) -> pa.Table:
        """Decode a block of samples; `error` is as that of `ftexp.data.feeds.decoding.Decode`."""
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
    """Return the same of a block of a source that is in memory."""
    pixels, heights = [image.tobytes() for image in batch["image"]], [len(image) for image in batch["image"]]
    return _table(pixels, heights, batch["label"], batch["sample"], [""] * len(pixels))


def mean_pixels(config: DataConfig, listing: Listing) -> int:
    """Return about how many pixels a training picture has, by a few; the final number if none of them can be read."""
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
            with contextlib.suppress(Exception):  # decoding reports it
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
    """Return the pictures of a cached split, with the columns that `DataBundle` describes."""
    return stored_pictures(dataset.map_batches(_of_arrays, batch_size=None).materialize(), channels, is_final=True)


def stored_pictures(dataset: Dataset, channels: int, is_final: bool) -> IndexedSplit:
    """Return a split of the good samples of `DecodePictures`' materialised blocks, in the order of their numbers.

    is_final: whether they are of the size that models see.
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
    """Reads pictures out of blocks in the object store: each block's first item, and where the block is."""

    blocks: Shared[tuple[Int64s, list[ray.ObjectRef]]]
    channels: int
    is_final: bool

    def __call__(self, items: Int64s) -> Iterator[Raw]:
        """Yield a number for a place, and how to get the picture."""
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
    """The pictures of a block, where they lie: an item of a table takes Arrow many times as long to give."""

    pixels: UInt8s  # of all pictures
    ends: Int64s  # where the first begins, and each ends
    heights: Int64s

    @classmethod
    def of(cls, table: pa.Table) -> _Block:
        """Return what a table of `DecodePictures` holds."""
        column = table["pixels"]
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        _, ends, pixels = column.buffers()
        first, last = column.offset, column.offset + len(column) + 1
        return cls(
            np.frombuffer(pixels, np.uint8), np.frombuffer(ends, np.int64)[first:last], table["height"].to_numpy()
        )
