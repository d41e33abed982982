"""Findings for data.task=regression: errors in the units of the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ftexp.data.info import DataInfo
from ftexp.data.targets import in_units
from ftexp.evaluation.gathering import gathered

Floats = npt.NDArray[np.float64]


class NumberFindings:
    """Findings of regression. They take 8 bytes per sample and target; rank 0 gathers those of all ranks."""

    def __init__(self) -> None:
        self._pairs: list[Any] = []  # float32 [rows, 2, num_targets] by batch: outputs and targets, not in data units

    def add(self, images: Tensor, targets: Tensor, outputs: Tensor) -> None:  # noqa: ARG002 - the interface of Findings
        """Count a batch: targets and outputs [rows, num_targets]."""
        self._pairs.append(np.stack([outputs.float().cpu().numpy(), targets.float().cpu().numpy()], 1))

    def report(self, info: DataInfo) -> dict[str, Any]:
        """Return the content of `evaluation_<split>.json`, on rank 0; collective."""
        pairs = [batch for part in gathered(self._pairs) for batch in part]
        values = np.concatenate(pairs or [np.empty((0, 2, info.num_classes), np.float32)])
        predicted, true = (in_units(values[:, which], info.target_mean, info.target_std) for which in (0, 1))
        targets = [errors(predicted[:, number], true[:, number]) for number in range(info.num_classes)]
        overall = {key: _mean([row[key] for row in targets]) for key in ("mae", "mse", "r2")}
        return {
            "num_samples": len(values),
            **overall,
            "targets": [{"target": name, **row} for name, row in zip(info.class_names, targets, strict=True)],
            "classes": [],
            "confusion": None,
            "mistakes": [],
        }


def errors(predicted: Floats, true: Floats) -> dict[str, float | None]:
    """Return mae, mse and r2 of one target.

    All are None without samples or with a non-finite prediction; r2 is None for a constant target. Sums are exact, so
    they don't depend on how samples are distributed over ranks.
    """
    count = len(true)
    if not count or not np.isfinite(predicted).all():
        return {"mae": None, "mse": None, "r2": None}
    misses = predicted - true
    squares, mean = math.fsum(misses**2), math.fsum(true) / count
    spread = math.fsum((true - mean) ** 2)
    return {
        "mae": math.fsum(np.abs(misses)) / count,
        "mse": squares / count,
        "r2": 1 - squares / spread if spread else None,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
