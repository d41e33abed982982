"""The labels of samples for each `data.task`, as an array with one row per sample.

single_label  int64 [num_samples]: the class
multi_label   uint8 [num_samples, bytes]: one bit per class, 8 in a byte, the first class in the lowest bit
regression    float32 [num_samples, num_targets]: the numbers in the data

In the multi_label format, 1.2 million samples of 1,000 classes take 150 MB. `Labels` are split, gathered and sent in
these formats; they are converted to tensors with each batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ftexp.config.schema import REGRESSION, DataConfig
from ftexp.data.order import Int64s

Labels = npt.NDArray[Any]  # any of the three
Bits = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]

_COUNTED_ROWS = 4096  # rows unpacked at a time


def is_packed(labels: Labels) -> bool:
    """Return whether these are sets of classes."""
    return labels.dtype == np.uint8


def is_numbers(labels: Labels) -> bool:
    """Return whether these are targets of a regression."""
    return labels.dtype.kind == "f"


def packed(rows: Int64s, classes: Int64s, num_samples: int, num_classes: int) -> Bits:
    """Return the sets of classes of samples, where sample `rows[i]` has class `classes[i]`."""
    bits = np.zeros((num_samples, -(-num_classes // 8)), np.uint8)
    np.bitwise_or.at(bits, (rows, classes // 8), np.left_shift(1, classes % 8).astype(np.uint8))
    return bits


def unpacked(bits: Bits, num_classes: int) -> Bits:
    """Return uint8 [rows, num_classes]: 1 if the sample has the class, else 0."""
    return np.unpackbits(bits, axis=1, count=num_classes, bitorder="little")


def class_counts(labels: Labels, num_classes: int) -> Int64s:
    """Return the number of samples with each class, [num_classes]."""
    if not is_packed(labels):
        return np.bincount(labels, minlength=num_classes)
    counts = np.zeros(num_classes, np.int64)
    for start in range(0, len(labels), _COUNTED_ROWS):
        counts += unpacked(labels[start : start + _COUNTED_ROWS], num_classes).sum(0, dtype=np.int64)
    return counts


def strata(labels: Labels) -> Int64s:
    """Return each sample's group, [num_samples]; a split divides all groups in the same proportions.

    single_label: the class. multi_label: the sample's rarest class, or a group for samples without classes.
    regression: one group for all.
    """
    if is_numbers(labels):
        return np.zeros(len(labels), np.int64)
    if not is_packed(labels):
        return labels
    num_bits = labels.shape[1] * 8
    counts = class_counts(labels, num_bits)
    by_number = np.argsort(counts, kind="stable")  # among equal counts, the earlier class first
    found = np.full(len(labels), num_bits, np.int64)
    for start in range(0, len(labels), _COUNTED_ROWS):
        sets = unpacked(labels[start : start + _COUNTED_ROWS], num_bits)[:, by_number]
        some = sets.any(1)
        found[start : start + _COUNTED_ROWS][some] = by_number[sets.argmax(1)[some]]
    return found


def _mean_std(targets: Float32s) -> tuple[list[float], list[float]]:
    """Return mean and std of each target, [num_targets]; sums are exact, so they are the same on every machine.

    A constant target gets a std of 1.
    """
    columns = targets.astype(np.float64).T
    means = [math.fsum(column) / len(column) for column in columns]
    stds = [
        math.sqrt(math.fsum((column - mean) ** 2) / len(column)) for column, mean in zip(columns, means, strict=True)
    ]
    return means, [std or 1.0 for std in stds]


def target_facts(config: DataConfig, labels: Labels) -> dict[str, Any]:
    """Return the fields of `DataInfo` that come from the targets of train."""
    if config.task != REGRESSION or not config.standardize_targets or not len(labels):
        return {}
    mean, std = _mean_std(labels)
    return {"target_mean": mean, "target_std": std}


def in_units(outputs: Float32s, mean: Sequence[float] | None, std: Sequence[float] | None) -> npt.NDArray[np.float64]:
    """Return standardised targets, or a model's outputs, in the units of the data: [rows, num_targets].

    mean, std: from `DataInfo`; None if targets are not standardised.
    """
    values = outputs.astype(np.float64)
    if mean is None or std is None:
        return values
    found: npt.NDArray[np.float64] = values * np.array(std) + np.array(mean)
    return found


def _written(value: float) -> str:
    """Return a float32 number as text, with up to 6 digits, or more if needed to distinguish it from all others."""
    texts = [f"{value:.{digits}g}" for digits in range(6, 10)]
    return next((text for text in texts if np.float32(text) == np.float32(value)), texts[-1])


def joined_label(label: Any, class_names: Sequence[str], separator: str) -> str:
    """Return one row of `Labels` as text: the class, the classes, or the numbers."""
    row: Labels = np.asarray(label)
    if is_numbers(row):
        return separator.join(_written(value) for value in row.tolist())
    if not is_packed(row):
        return class_names[int(row)]
    held = np.flatnonzero(unpacked(row[None], len(class_names))[0]).tolist()
    return separator.join(class_names[number] for number in held)


def distinct(labels: Labels, class_names: Sequence[str], separator: str) -> tuple[list[str], Int64s]:
    """Return the distinct labels as text, and the index of each sample's label in them, [num_samples]."""
    if labels.ndim == 1:
        return list(class_names), labels
    rows, numbers = np.unique(labels, axis=0, return_inverse=True)
    return [joined_label(row, class_names, separator) for row in rows], numbers.reshape(-1).astype(np.int64)


def label_column(labels: Labels) -> Any:
    """Convert labels to a column of a pyarrow table, which `label_rows` reads; single-class labels stay an array."""
    import pyarrow as pa

    if labels.ndim == 1:
        return labels
    return pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), labels.shape[1])


def label_rows(column: Any) -> Labels:
    """Return the labels of a column, a pyarrow chunked array, that `label_column` made."""
    import pyarrow as pa

    if not pa.types.is_fixed_size_list(column.type):
        found: Labels = column.to_numpy()
        return found
    width = column.type.list_size
    values: Labels = column.combine_chunks().flatten().to_numpy()
    return values.reshape(-1, width)
