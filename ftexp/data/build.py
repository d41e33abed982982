"""The data of a run and their feed: cached in memory if they fit, else streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

import ftexp.data.sources.files
import ftexp.data.sources.image_list
import ftexp.data.sources.parquet
import ftexp.data.sources.synthetic
import ftexp.data.sources.webdataset  # noqa: F401 - these register the built-in sources
from ftexp.config.schema import AUTO, AugmentConfig, Config, DataConfig
from ftexp.data.feeds.cached import array_pictures, decoded_bundle, mean_pixels
from ftexp.data.feeds.decoding import refuse_bad
from ftexp.data.info import DataBundle, Reader, reasons
from ftexp.data.listing import Listing
from ftexp.data.sampling import ClassTable, num_draws
from ftexp.data.sources.arrays import make_info
from ftexp.data.sources.blocks import BlockReader
from ftexp.data.sources.registry import sources
from ftexp.data.targets import Labels
from ftexp.errors import DataError

_SHARE = 0.5  # maximum share of the object store for a cached data set


def build_data(
    config: DataConfig,
    augment: AugmentConfig | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    only_evaluates: bool = False,
) -> DataBundle:
    """Read the data of the source `config.name`; DataError if that fails. Ray must be running.

    augment: augmentation of the training split, which determines how it is cached; None: no training.
    runtime_env: runtime_env of the decoding tasks; None: the job's.
    only_evaluates: samples are read in order, and no training split is needed.
    """
    augment = augment or AugmentConfig()
    found = sources.get(config.name)(config)
    in_blocks = bool(found.block_sizes) if isinstance(found, Listing) else found.blocks is not None
    if config.shuffle_window is not None and not in_blocks:
        raise DataError(
            f"data.shuffle_window={config.shuffle_window}, but data.name={config.name} is not read in blocks: remove "
            "data.shuffle_window"
        )
    if isinstance(found, Listing):
        bundle = _from_files(config, found, augment, runtime_env, only_evaluates)
    elif config.feed == "streaming":
        raise DataError(f"data.feed=streaming, but data.name={config.name} is held in memory: set data.feed=cached")
    else:
        bundle = dataclasses.replace(found, why=f"data.name={config.name} is held in memory")
    if not only_evaluates and not bundle.info.num_samples.get("train"):
        raise DataError(
            f"data.name={config.name}: the training split has no samples; check data.root and the fractions"
            + reasons(bundle.info.excluded or [], bundle.info.bad_samples)
        )
    if augment.changes_pictures and not bundle.streams:
        datasets = dict(bundle.datasets)
        pictures = array_pictures(datasets.pop("train"), bundle.info.channels)
        bundle = dataclasses.replace(bundle, datasets=datasets, pictures=pictures)
    return bundle


def drawn_by_class(config: Config, bundle: DataBundle) -> DataBundle:
    """Add the table of classes that data.sampling needs; DataError if an epoch is too short for it."""
    sampling, repeats = config.data.sampling, config.augment.repeats
    if sampling == "shuffle":
        return bundle
    table = ClassTable.of(_train_labels(bundle), bundle.info.num_classes)
    num_classes, draws = np.count_nonzero(table.counts), num_draws(len(table.members), repeats)
    if sampling == "sqrt" and draws < num_classes:
        raise DataError(
            f"data.sampling=sqrt draws each class in every epoch, but augment.repeats={repeats} leaves {draws:,} draws "
            f"for {num_classes:,} classes: set data.sampling=balanced, or lower augment.repeats"
        )
    info = dataclasses.replace(bundle.info, class_counts=table.counts.tolist())
    return dataclasses.replace(bundle, info=info, classes=table)


def _train_labels(bundle: DataBundle) -> Labels:
    """Return the label of each training sample, in the order of the sample numbers."""
    if "train" in bundle.streams:
        return bundle.streams["train"].table.get()[1]
    columns = bundle.datasets["train"].select_columns(["sample", "label"])
    blocks = list(columns.iter_batches(batch_size=None, batch_format="numpy"))
    samples, labels = (np.concatenate([block[name] for block in blocks]) for name in ("sample", "label"))
    in_order: Labels = labels[np.argsort(samples, kind="stable")]
    return in_order


def _from_files(
    config: DataConfig,
    listing: Listing,
    augment: AugmentConfig,
    runtime_env: Mapping[str, Any] | None,
    only_evaluates: bool,
) -> DataBundle:
    num_samples = sum(len(labels) for labels in listing.labels.values())
    pixels = num_samples * config.image_size**2
    if augment.crop != "none" and config.feed != "streaming":  # train is cached at full size, for cropping
        num_train = len(listing.labels["train"])
        pixels += num_train * (mean_pixels(config, listing) - config.image_size**2)
    needed, there = pixels * config.channels, _object_store_bytes()
    sizes = f"decoded, it takes {_size(needed)}, and a node's object store has {_size(there)}"
    if config.feed != AUTO:
        feed, why = config.feed, f"as data.feed says; {sizes}"
    else:
        feed, why = ("cached" if needed <= _SHARE * there else "streaming"), sizes
    if feed == "cached":
        bundle = decoded_bundle(config, listing, augment, runtime_env)
    else:
        bundle = _streamed(config, listing, _stream_readers(config, listing, sizes, only_evaluates))
    return dataclasses.replace(bundle, feed=feed, why=why)


def _streamed(config: DataConfig, listing: Listing, readers: Mapping[str, Reader]) -> DataBundle:
    refuse_bad(config, listing.bad)
    splits = listing.splits(config, readers)
    info = make_info(
        config,
        listing.class_names,
        {name: split.num_samples for name, split in splits.items()},
        **listing.facts(config, splits),
    )
    return DataBundle({}, info, splits, splits["train"].block_sizes)


def _stream_readers(config: DataConfig, listing: Listing, sizes: str, in_order: bool) -> Mapping[str, Reader]:
    """Return the reader of each split: one that reads single samples, or one that reads blocks."""
    if config.shuffle_window is not None:
        return _block_readers(listing, config.shuffle_window)
    if listing.single_readers or not listing.block_sizes:
        return listing.single_readers or listing.readers
    if in_order:
        return _block_readers(listing, 1)
    raise DataError(
        f"data.shuffle_window is not set, and streaming shuffled single rows of data.name={config.name} would "
        "read a whole row group for each: set, for example, data.shuffle_window=8 to shuffle row groups, "
        f"and rows within 8 of them at a time; or set data.feed=cached ({sizes})"
    )


def _block_readers(listing: Listing, num_blocks: int) -> dict[str, Reader]:
    """Return readers that share a cache for windows of `num_blocks` blocks."""
    readers: dict[str, Reader] = {}
    for split, reader in listing.readers.items():
        assert isinstance(reader, BlockReader), "what a Listing has block_sizes for is read by one"
        readers[split] = reader.with_cache(num_blocks)
    return readers


def _object_store_bytes() -> float:
    """Return the size of the smallest node's object store: each node that trains holds the whole cached data set."""
    nodes = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return float(min(nodes))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
