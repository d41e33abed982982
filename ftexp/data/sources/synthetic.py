"""The source synthetic: images of any size and number, whose labels can be learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL, DataConfig
from ftexp.data.info import SPLITS, DataBundle
from ftexp.data.order import Int64s, derive_seed, uniforms
from ftexp.data.sources.arrays import BLOCK_BYTES, make_info
from ftexp.data.sources.registry import register_source
from ftexp.data.stratify import stratified_split
from ftexp.data.targets import Labels, packed, target_facts

_LABELS = 0x6C6162  # keeps the labels' draws apart from those of the noise
_MEAN_CLASSES = 2  # mean number of classes of a multi_label sample
_GREY = 128

_Columns = dict[str, npt.NDArray[Any]]


@register_source("synthetic")
def synthetic(config: DataConfig) -> DataBundle:
    """Generate images in which each class has its own pattern, with noise; `num_samples` in all splits together.

    multi_label: a sample shows the patterns of all its classes. regression: a sample shows `num_classes` patterns, with
    the targets, each from -1 to 1, as their strengths.
    """
    import ray.data

    assert config.num_samples is not None, "conf/data/synthetic.yaml sets it"
    num_classes, seed = config.num_classes or 10, config.split_seed
    size, channels = config.image_size, config.channels
    patterns = np.random.default_rng(seed).integers(64, 192, (num_classes, size, size, channels))
    task = config.task

    def make(batch: _Columns) -> _Columns:
        samples = batch["sample"]
        images = np.empty((len(samples), size, size, channels), np.uint8)
        strengths = None if task == SINGLE_LABEL else _strengths(task, seed, samples, num_classes)
        for row, sample in enumerate(samples):
            noise = np.random.default_rng(derive_seed(seed, int(sample))).integers(-64, 64, (size, size, channels))
            if strengths is None:
                images[row] = patterns[sample % num_classes] + noise
            else:
                images[row] = _blend(patterns, strengths[row]) + noise
        return {"image": images, "label": _labels(task, seed, samples, num_classes), "sample": samples}

    labels = _labels(task, seed, np.arange(config.num_samples), num_classes)
    parts = stratified_split(labels, (config.val_fraction, config.test_fraction), seed)
    rows = max(1, BLOCK_BYTES // (size * size * channels))
    datasets = {
        name: ray.data.from_numpy(part)
        .rename_columns({"data": "sample"})
        .map_batches(make, batch_size=min(rows, 4096))
        .materialize()
        for name, part in zip(SPLITS, parts, strict=True)
    }
    names = [f"{'target' if task == REGRESSION else 'pattern'}_{number}" for number in range(num_classes)]
    sizes = {name: len(part) for name, part in zip(SPLITS, parts, strict=True)}
    return DataBundle(datasets, make_info(config, names, sizes, **target_facts(config, labels[parts[0]])))


def _strengths(task: str, seed: int, samples: Int64s, num_classes: int) -> npt.NDArray[np.float64]:
    """Return the strength of each pattern, [samples, num_classes]."""
    places = samples[:, None] * num_classes + np.arange(num_classes)
    draws = uniforms(derive_seed(seed, _LABELS), places, 0)
    return 2 * draws - 1 if task == REGRESSION else (draws < _MEAN_CLASSES / num_classes).astype(np.float64)


def _labels(task: str, seed: int, samples: Int64s, num_classes: int) -> Labels:
    if task == SINGLE_LABEL:
        classes: Int64s = samples % num_classes
        return classes
    strengths = _strengths(task, seed, samples, num_classes)
    if task == MULTI_LABEL:
        rows, classes = np.nonzero(strengths)
        return packed(rows, classes, len(samples), num_classes)
    return strengths.astype(np.float32)


def _blend(patterns: npt.NDArray[np.int64], strengths: npt.NDArray[np.float64]) -> Int64s:
    """Return the patterns on grey, each with its strength, clipped so that values with noise are within 0..255."""
    shown = np.flatnonzero(strengths)
    total = (strengths[shown, None, None, None] * (patterns[shown] - _GREY)).sum(0)
    blend: Int64s = np.clip(np.round(total + _GREY), 64, 191).astype(np.int64)
    return blend
