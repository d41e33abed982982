"""Conversion of the model's outputs to columns of a file, by `data.task`.

single_label  label, probability, label_2, ...: the most probable classes and their softmax probabilities
multi_label   labels, probabilities: the classes above their threshold and their sigmoid probabilities, descending;
              lists in parquet, text separated by `;` in CSV
regression    a column for each target, in the units of the data
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from ftexp.data.info import DataInfo
from ftexp.data.targets import in_units

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

CSV_SEPARATOR = ";"
RESERVED = ("path", "truth", "error")  # columns of every file
Bools = npt.NDArray[np.bool_]
AnswerColumns = Callable[[dict[str, Any], list[str], Bools], "dict[str, pa.Array]"]  # batch, class names, bad rows


class Plan(Protocol):
    """The fields of a `PredictionPlan` that this module reads."""

    @property
    def format(self) -> str:
        """parquet or csv."""
        ...

    @property
    def thresholds(self) -> list[float] | None:
        """Threshold of each class."""
        ...


def answered(outputs: Tensor, info: DataInfo, top_k: int) -> tuple[Any, Any]:
    """Return classes and values, [rows, top_k], of outputs [rows, num_classes]; the columns are made of them."""
    import torch

    if info.task == SINGLE_LABEL:
        surest = probabilities(outputs, info).topk(top_k)
        return surest.indices.cpu(), surest.values.cpu()
    return torch.arange(top_k).expand(len(outputs), top_k), probabilities(outputs, info).cpu()


def probabilities(outputs: Tensor, info: DataInfo) -> Tensor:
    """Convert outputs [rows, num_classes] to the probability of each class, or to each target in its own unit."""
    import torch

    outputs = outputs.float()
    if info.task == REGRESSION:
        return torch.from_numpy(in_units(outputs.cpu().numpy(), info.target_mean, info.target_std))
    return outputs.sigmoid() if info.task == MULTI_LABEL else outputs.softmax(1)


def answers_of(plan: Plan, task: str) -> AnswerColumns:
    """Return the function that makes the columns of a task."""
    if task == MULTI_LABEL:
        assert plan.thresholds is not None, "made by ftexp.predict"
        return functools.partial(_sets, thresholds=np.array(plan.thresholds, np.float32), joins=plan.format == "csv")
    return _numbers if task == REGRESSION else surest_classes


def surest_classes(batch: dict[str, Any], class_names: list[str], bad: Bools) -> dict[str, pa.Array]:
    """Return the columns of `classes` and `probabilities`, [rows, top_k], by descending probability."""
    import pyarrow as pa

    names, columns = np.array(class_names, object), dict[str, "pa.Array"]()
    classes, probabilities = np.stack(list(batch["classes"])), np.stack(list(batch["probabilities"]))
    for place in range(classes.shape[1]):
        suffix = f"_{place + 1}" if place else ""
        columns[f"label{suffix}"] = pa.array(names[classes[:, place]], pa.string(), mask=bad)
        columns[f"probability{suffix}"] = pa.array(probabilities[:, place], pa.float32(), mask=bad)
    return columns


def _sets(
    batch: dict[str, Any], class_names: list[str], bad: Bools, thresholds: npt.NDArray[np.float32], joins: bool
) -> dict[str, pa.Array]:
    import pyarrow as pa

    labels: list[Any] = []
    shares: list[Any] = []
    for probabilities, is_bad in zip(batch["probabilities"], bad, strict=True):
        order = np.argsort(-probabilities, kind="stable")
        predicted = order[(probabilities > thresholds)[order]]
        labels.append(None if is_bad else [class_names[number] for number in predicted])
        shares.append(None if is_bad else probabilities[predicted].tolist())
    if not joins:
        return {
            "labels": pa.array(labels, pa.list_(pa.string())),
            "probabilities": pa.array(shares, pa.list_(pa.float32())),
        }
    written = [None if row is None else [f"{value:.6g}" for value in row] for row in shares]
    return {name: _joined(column) for name, column in (("labels", labels), ("probabilities", written))}


def _joined(column: list[Any]) -> pa.Array:
    import pyarrow as pa

    return pa.array([None if row is None else CSV_SEPARATOR.join(row) for row in column], pa.string())


def _numbers(batch: dict[str, Any], class_names: list[str], bad: Bools) -> dict[str, pa.Array]:
    import pyarrow as pa

    values = np.stack(list(batch["probabilities"]))
    # a target may have the name of a column that every file has
    names = [f"{name}_predicted" if name in RESERVED else name for name in class_names]
    return {name: pa.array(values[:, place], pa.float64(), mask=bad) for place, name in enumerate(names)}
