"""The progress of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ftexp.evaluation.meter import Meter


@dataclass(frozen=True)
class Pending:
    """A checkpoint whose evaluation is pending. Its name differs between attempts, so states don't have it."""

    step: int
    epoch: int
    checkpoint: str  # "" until `ftexp.worker.validation.ask_again` has found it


@dataclass
class Progress:
    """The progress of a run. `position` is authoritative; `step` and `epoch` are counted along with it."""

    train: Meter  # since the last logged point
    total_positions: int  # samples per epoch times epochs, at most up to train.max_steps
    step: int = 0  # optimiser steps done
    position: int = 0  # samples that have driven an update
    epoch: int = 0  # complete epochs
    metrics: dict[str, float] = field(default_factory=dict)  # latest value of each
    best: dict[str, Any] = field(default_factory=dict)  # {"metric": name, "value": float, "step": int}, or empty
    num_overflows: int = 0  # steps that the fp16 loss scaler skipped
    stopped: str | None = None  # reason why a hook stopped the run at this step
    pending: list[Pending] = field(default_factory=list)  # pending evaluations, oldest first

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or a hook has ended the run."""
        return self.stopped is not None or self.position >= self.total_positions

    def advance(self, end: int, num_samples: int) -> bool:
        """Count the step that ended at position `end`; returns whether an epoch of `num_samples` ended in it."""
        self.step += 1
        self.position = end
        before, self.epoch = self.epoch, end // num_samples
        return self.epoch > before

    def update_best(self, metric: str, order: str, step: int | None = None) -> None:
        """Record `step`, by default the last, if `metric` was never better, or if another metric selected the best.

        order: "max" or "min".
        """
        value = self.metrics.get(metric)
        if value is None or math.isnan(value):
            return
        sign = 1 if order == "max" else -1
        if self.best.get("metric") != metric or sign * value > sign * self.best["value"]:
            self.best = {"metric": metric, "value": value, "step": self.step if step is None else step}

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, the same on every rank; collective, since meters are summed over ranks.

        `best`, `num_overflows` and `stopped` are saved by other states.
        """
        pending = [{"step": each.step, "epoch": each.epoch} for each in self.pending]
        return {
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "train": self.train.totals(),
            "metrics": dict(self.metrics),
            **({"pending": pending} if pending else {}),
        }

    def load_state_dict(self, state: dict[str, Any], rank: int) -> None:
        """Restore the result of `state_dict`."""
        self.epoch, self.step, self.position = state["epoch"], state["step"], state["position"]
        self.metrics = dict(state["metrics"])
        self.pending = [Pending(**each, checkpoint="") for each in state.get("pending", [])]
        self.train.restore(state["train"], rank)
