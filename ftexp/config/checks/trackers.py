"""Checks of `tracker.*`, before any tracker's package is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator

from ftexp.config.masking import masked
from ftexp.config.schema import Config
from ftexp.config.tracker_schema import HTTP, TRACKER_PACKAGES, TrackerConfig
from ftexp.registry import FROM_PLUGINS, did_you_mean
from ftexp.storage.uri import is_remote

_WRITE_FILES = ("tensorboard", "wandb")


def tracker_problems(config: Config) -> Iterator[str]:
    """Yield a message for each mistake; trackers of plug-ins are checked after their import."""
    tracker = config.tracker
    for name in tracker.names:
        if name not in TRACKER_PACKAGES:
            if not config.plugins:
                yield (
                    f"tracker.use names '{name}', which is unknown.{did_you_mean(name, TRACKER_PACKAGES)} Available: "
                    f"{', '.join(TRACKER_PACKAGES)}. {FROM_PLUGINS}"
                )
        elif _needs_package(config, name) and importlib.util.find_spec(package := TRACKER_PACKAGES[name]) is None:
            yield (
                f"tracker={name} needs the package {package}, which isn't installed: write uv run --extra {name} in "
                f"front of the command, or pip install 'ftexp[{name}]'"
            )
    yield from _unused(tracker)
    for name in (each for each in _WRITE_FILES if each in tracker.names):
        directory = getattr(tracker, name).dir
        if directory is not None and is_remote(directory):
            yield f"tracker.{name}.dir={directory} is not on a disk: {name} writes files; give a local directory"
        elif directory is None and is_remote(config.run.storage):
            yield (
                f"tracker={name} writes to a disk, but run.storage={config.run.storage} is not on one: set "
                f"tracker.{name}.dir"
            )
    if is_remote(config.run.storage):
        if "mlflow" in tracker.names and not (tracker.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            yield (
                f"tracker=mlflow keeps its database on a disk, but run.storage={config.run.storage} is not on one: set "
                "tracker.mlflow.tracking_uri"
            )


def _needs_package(config: Config, name: str) -> bool:
    """Return whether the driver imports the tracker's package."""
    return name != "prometheus" or config.tracker.prometheus.exporter(config.scaling.address) == HTTP


def _unused(tracker: TrackerConfig) -> Iterator[str]:
    """Yield a message for each setting that no tracker reads."""
    usual = TrackerConfig()
    for name in TRACKER_PACKAGES:
        own = getattr(tracker, name)
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            if name not in tracker.names and value != getattr(getattr(usual, name), field.name):
                shown = masked({field.name: value})[field.name]
                yield f"tracker.{name}.{field.name}={shown} is not used: remove it, or add tracker={name}"
    if not tracker.names:
        for key in ("tags", "kwargs"):
            if value := getattr(tracker, key):
                yield f"tracker.{key}={masked(value)} is not used by tracker=none: remove it"
