"""All names that a plug-in, a module listed in `plugins=[...]`, imports from ftexp.

Each name is imported at its first use: some need Ray or torch, and a plug-in that only registers a tracker, for
example, need not wait for these.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftexp.checkpoint.registry import State, StateContext, register_state
    from ftexp.data.augment.registry import Augmentation, register_augmentation
    from ftexp.data.sources.arrays import bundle_from_arrays
    from ftexp.data.sources.registry import register_source
    from ftexp.evaluation.metric_registry import Metric, MetricContext, register_metric
    from ftexp.job.hook_registry import Hook, HookContext, register_hook
    from ftexp.model.loss_registry import Loss, LossContext, register_loss
    from ftexp.registry import load_plugins
    from ftexp.trackers.registry import Outcome, Point, TrackedRun, Tracker, register_tracker

_HOMES = {
    "ftexp.checkpoint.registry": ("State", "StateContext", "register_state"),
    "ftexp.data.augment.registry": ("Augmentation", "register_augmentation"),
    "ftexp.data.sources.arrays": ("bundle_from_arrays",),
    "ftexp.data.sources.registry": ("register_source",),
    "ftexp.evaluation.metric_registry": ("Metric", "MetricContext", "register_metric"),
    "ftexp.job.hook_registry": ("Hook", "HookContext", "register_hook"),
    "ftexp.model.loss_registry": ("Loss", "LossContext", "register_loss"),
    "ftexp.registry": ("load_plugins",),
    "ftexp.trackers.registry": ("Outcome", "Point", "TrackedRun", "Tracker", "register_tracker"),
}
__all__ = [
    "Augmentation",
    "Hook",
    "HookContext",
    "Loss",
    "LossContext",
    "Metric",
    "MetricContext",
    "Outcome",
    "Point",
    "State",
    "StateContext",
    "TrackedRun",
    "Tracker",
    "bundle_from_arrays",
    "load_plugins",
    "register_augmentation",
    "register_hook",
    "register_loss",
    "register_metric",
    "register_source",
    "register_state",
    "register_tracker",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'ftexp.plugins' has no attribute '{name}'")
