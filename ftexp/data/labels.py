"""Labels as sources write them, and the classes that they name."""

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

_MAX_SHOWN = 10  # classes that a warning names
_HELD = {False: "samples", True: "labels"}  # by whether a sample has any number of them


def from_text(columns: Mapping[str, Sequence[str]], config: DataConfig) -> dict[str, list[str | int]]:
    """Return the labels of each split as whole numbers if all are written as those are printed, or else as text.

    Under data.integer_labels=indices, digits are a number even next to text, and with zeros before it.
    """
    found = {split: [written_number(text, config) for text in column] for split, column in columns.items()}
    if config.integer_labels == "indices" or all(isinstance(label, int) for own in found.values() for label in own):
        return found
    return {split: list(column) for split, column in columns.items()}


def written_number(text: str, config: DataConfig) -> str | int:
    """Return the number that one text alone stands for; itself if it is none."""
    digits = text.isascii() and text.isdigit()
    return int(text) if digits and (config.integer_labels == "indices" or text in ("0", text.lstrip("0"))) else text


def class_numbers(
    raw: Mapping[str, Sequence[Any]], config: DataConfig, what: str, where: Callable[[str, int], str]
) -> tuple[list[str], dict[str, Int64s]]:
    """Return class names, and each split's labels as their numbers.

    Classes are the values that occur: text in the order of its characters, whole numbers in theirs. Whole numbers are
    themselves the classes' numbers under data.integer_labels=indices, and where they are all below data.num_classes.

    Args:
        raw: labels of each split: text, or integers.
        config: has `num_classes` and `integer_labels`.
        what: holds the labels, for errors.
        where: the place of a split's item, for errors.

    Raises:
        DataError: there is a label that is none of those, or both kinds; it is named with its place.
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
    """Return what looks wrong about classes: those that train lacks, and names that differ in case or encoding only.

    labels: of each split's samples; those of a regression have no classes.
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
