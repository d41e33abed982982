"""Parsing of a source's label cells for each `data.task`.

A cell with several labels or numbers is a list, or text: a JSON list, or parts separated by `data.label_separator`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL, DataConfig
from ftexp.counting import counted
from ftexp.data.labels import class_numbers, from_text
from ftexp.data.targets import Labels, packed
from ftexp.errors import DataError

Cells = Mapping[str, Sequence[Any]]  # label cells of each split, by item
Where = Callable[[str, int], str]  # (split, item) -> location, for errors


def label_columns(config: DataConfig) -> tuple[str, ...]:
    """Return the columns of a table that hold the labels; with several columns, a cell is a list."""
    return tuple(config.target_columns) if config.target_columns is not None else (config.label_column,)


def label_field(config: DataConfig) -> str:
    """Return the name of the setting that `label_columns` reads."""
    return "data.label_column" if config.target_columns is None else "data.target_columns"


def labels_key(config: DataConfig) -> str:
    """Return the setting of `label_columns` with its value, for errors."""
    value = config.label_column if config.target_columns is None else config.target_columns
    return f"{label_field(config)}={value}"


def label_values(cell: Any, config: DataConfig) -> list[Any]:
    """Return the labels of one cell; ValueError for text that starts like a JSON list and isn't one."""
    if cell is None:
        return []
    if isinstance(cell, str):
        if cell.lstrip().startswith("["):
            return list(json.loads(cell))
        return [part for text in cell.split(config.label_separator) if (part := text.strip())]
    return list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else [cell]


def cell_text(cell: Any, config: DataConfig) -> str:
    """Return a cell's labels as text, joined by `data.label_separator`; a cell that can't be parsed unchanged."""
    try:
        return config.label_separator.join(map(str, label_values(cell, config)))
    except ValueError:
        return str(cell)


def as_labels(
    cells: Cells, config: DataConfig, what: str, where: Where, is_text: bool = True
) -> tuple[list[str], dict[str, Labels]]:
    """Return the names of the classes or targets, and each split's labels.

    is_text: whether the source contains only text, so that text that looks like a number is treated as a number.

    Raises:
        DataError: a cell is invalid for `config.task`; the message gives its location.
    """
    if config.task == SINGLE_LABEL:
        names, numbers = class_numbers(from_text(cells, config) if is_text else cells, config, what, where)
        return names, dict(numbers)
    found = {split: _rows(split, column, config, what, where) for split, column in cells.items()}
    if config.task == REGRESSION:
        return _targets(found, config, what, where)
    assert config.task == MULTI_LABEL, "a choice of the schema"
    return _sets(found, config, what, where, is_text)


def _rows(split: str, column: Sequence[Any], config: DataConfig, what: str, where: Where) -> list[list[Any]]:
    rows = []
    for item, cell in enumerate(column):
        try:
            rows.append(label_values(cell, config))
        except ValueError as error:
            raise DataError(
                f"{what} holds {cell!r} at {where(split, item)}, which is not a JSON list: {error}"
            ) from error
    return rows


def _sets(
    found: Mapping[str, list[list[Any]]], config: DataConfig, what: str, where: Where, is_text: bool
) -> tuple[list[str], dict[str, Labels]]:
    owners = {split: np.repeat(np.arange(len(rows)), [len(row) for row in rows]) for split, rows in found.items()}
    flat: dict[str, list[Any]] = {split: [label for row in rows for label in row] for split, rows in found.items()}
    if not any(flat.values()):
        raise DataError(f"{what} holds no label at all")
    if is_text and all(isinstance(label, str) for column in flat.values() for label in column):
        flat = dict(from_text(flat, config))
    names, numbers = class_numbers(flat, config, what, lambda split, label: where(split, int(owners[split][label])))
    num_classes = max(len(names), config.num_classes or 0)
    return names, {
        split: packed(owners[split], numbers[split], len(rows), num_classes) for split, rows in found.items()
    }


def _targets(
    found: Mapping[str, list[list[Any]]], config: DataConfig, what: str, where: Where
) -> tuple[list[str], dict[str, Labels]]:
    first = next((len(row) for rows in found.values() for row in rows), 0)
    labels = {}
    for split, rows in found.items():
        for item, row in enumerate(rows):
            if len(row) != first or not row:
                raise DataError(
                    f"{what} holds {counted(len(row), 'number')} at {where(split, item)}, and {first} in the first "
                    "row: every sample needs as many targets, at least one"
                )
            row[:] = [_number(value, split, item, what, where) for value in row]
        labels[split] = np.array(rows, np.float32).reshape(len(rows), first)
    return _target_names(config, first), labels


def _number(value: Any, split: str, item: int, what: str, where: Where) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{what} holds {value!r} at {where(split, item)}: data.task=regression takes finite numbers")
    return number


def _target_names(config: DataConfig, num_targets: int) -> list[str]:
    columns = label_columns(config)
    return list(columns) if len(columns) == num_targets else [f"{columns[0]}_{number}" for number in range(num_targets)]
