"""Conversion of a source's labels to classes."""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ftexp.config.schema import DataConfig
from ftexp.data.order import Int64s
from ftexp.data.targets import Labels, class_counts, is_numbers, is_packed
from ftexp.errors import DataError

_MAX_SHOWN = 10  # maximum number of classes that a warning names
_HELD = {False: "samples", True: "labels"}  # what a warning counts, by whether the task is multi_label


def from_text(columns: Mapping[str, Sequence[str]], config: DataConfig) -> dict[str, list[str | int]]:
    """Return the labels of each split as integers if all are written as integers without leading zeros, else as text.

    With data.integer_labels=indices, any text of digits is an integer, also with leading zeros and among other text.
    """
    found = {split: [written_number(text, config) for text in column] for split, column in columns.items()}
    if config.integer_labels == "indices" or all(isinstance(label, int) for own in found.values() for label in own):
        return found
    return {split: list(column) for split, column in columns.items()}


def written_number(text: str, config: DataConfig) -> str | int:
    """Return a text as an integer if it is one, else unchanged."""
    digits = text.isascii() and text.isdigit()
    return int(text) if digits and (config.integer_labels == "indices" or text in ("0", text.lstrip("0"))) else text


def class_numbers(
    raw: Mapping[str, Sequence[Any]], config: DataConfig, what: str, where: Callable[[str, int], str]
) -> tuple[list[str], dict[str, Int64s]]:
    """Return the class names, and each split's labels as class numbers.

    The classes are the values that occur, sorted: text alphabetically, integers by value. Integers are class numbers
    themselves with data.integer_labels=indices, or if all are below data.num_classes.

    Args:
        raw: labels of each split: text, or integers.
        config: provides `num_classes` and `integer_labels`.
        what: name of the column or files with the labels, for errors.
        where: (split, item) -> location, for errors.

    Raises:
        DataError: a label is neither text nor a non-negative integer, or there are both kinds; the message gives its
            location.
    """
    earlier = config.integer_labels == "indices"
    number = sum(map(_is_number, _all(raw))) * 2 > sum(len(column) for column in raw.values())
    fits = _is_number if number else functools.partial(_is_name, empty=earlier)
    if not all(map(fits, _all(raw))):
        raise DataError(f"{what} {_first_wrong(raw, fits, where)}")
    names: list[Any] = sorted(set(_all(raw)))
    if number and (earlier or names[-1] < (config.num_classes or 0)):
        names = list(range(names[-1] + 1))
    numbers = {name: index for index, name in enumerate(names)}
    labels = {split: np.array([numbers[value] for value in column], np.int64) for split, column in raw.items()}
    return [str(int(name)) if number else name for name in names], labels


def _all(raw: Mapping[str, Sequence[Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(raw.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_name(value: Any, empty: bool) -> bool:
    return isinstance(value, str) and (empty or value.strip() != "")


def _first_wrong(
    raw: Mapping[str, Sequence[Any]], fits: Callable[[Any], bool], where: Callable[[str, int], str]
) -> str:
    wrong = [(split, item, value) for split, own in raw.items() for item, value in enumerate(own) if not fits(value)]
    split, item, value = wrong[0]
    shown = "no label" if value is None or value == "" else repr(value)
    more = f", and {len(wrong) - 1:,} more like it" if len(wrong) > 1 else ""
    return f"holds {shown} at {where(split, item)}{more}: labels are all text, or all whole numbers from 0"


def class_warnings(class_names: Sequence[str], labels: Mapping[str, Labels]) -> list[str]:
    """Return warnings about classes without training samples, and about names that differ only in case or encoding.

    labels: labels of each split; for those of a regression there are no warnings.
    """
    if any(map(is_numbers, labels.values())):
        return []
    counts = {split: class_counts(own, len(class_names)) for split, own in labels.items()}
    train = counts.pop("train", None)
    warnings = []
    for split, own in counts.items():
        if train is None:
            break
        lacking = np.flatnonzero((own > 0) & (train == 0))
        if len(lacking):
            shown = ", ".join(f"{class_names[number]!r} ({own[number]:,})" for number in lacking[:_MAX_SHOWN])
            more = f" and {len(lacking) - _MAX_SHOWN:,} more" if len(lacking) > _MAX_SHOWN else ""
            warnings.append(
                f"{int(own[lacking].sum()):,} of the {int(own.sum()):,} {_HELD[is_packed(labels[split])]} of {split} "
                f"have a class without a training sample, so each counts as wrong: {shown}{more}"
            )
    alike = defaultdict(list)
    for name in class_names:
        alike[unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())].append(name)
    twins = [" and ".join(map(ascii, names)) for names in alike.values() if len(names) > 1]
    if twins:
        more = f" and {len(twins) - _MAX_SHOWN:,} more" if len(twins) > _MAX_SHOWN else ""
        warnings.append(
            f"classes whose names differ in case or Unicode form only: {'; '.join(twins[:_MAX_SHOWN])}{more}"
        )
    return warnings
