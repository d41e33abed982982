"""Input of a report: the files that a run directory always has."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from ftexp.errors import ConfigError
from ftexp.rundir.names import (
    CHECKPOINTS,
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    OVERRIDES_FILE,
    RUN_FILE,
    evaluation_file,
)
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage

_SPLITS = ("test", "val", "train")  # the first split that has an evaluation is shown

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The content of a run directory."""

    uri: str
    state: Record  # run.json
    points: list[Record]  # metrics.jsonl
    events: list[Record]  # events.jsonl, by time
    config_text: str
    overrides: list[str]
    evaluation: Record | None  # evaluation_<split>.json
    kept: frozenset[str]  # checkpoints that exist now

    @cached_property
    def config(self) -> Record:
        """config.yaml, parsed."""
        values = OmegaConf.to_container(OmegaConf.create(self.config_text))
        return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}

    def named(self, *names: str) -> list[Record]:
        """Return the events of these names."""
        return [event for event in self.events if event["event"] in names]

    def split(self, name: str) -> list[Record]:
        """Return the logged points of a split, in the order of their steps."""
        return sorted((point for point in self.points if point["split"] == name), key=lambda point: point["step"])


def read_run(storage: Storage) -> RunFiles:
    """Read a run directory, finished or not; ConfigError if there is no run in it."""
    try:
        state = json.loads(storage.read_bytes(RUN_FILE))
    except OSError as error:
        raise ConfigError(f"{storage.uri} holds no {RUN_FILE}: give the directory of a run") from error
    events = [event for event in _lines(storage, EVENTS_FILE) if "time" in event and "event" in event]
    config_text = _text(storage, CONFIG_FILE)
    overrides = OmegaConf.to_container(OmegaConf.create(_text(storage, OVERRIDES_FILE) or "[]"))
    return RunFiles(
        uri=storage.uri,
        state=state,
        points=[point for point in _lines(storage, METRICS_FILE) if {"time", "split", "step"} <= point.keys()],
        events=sorted(events, key=lambda event: event["time"]),
        config_text=config_text,
        overrides=[str(word) for word in overrides] if isinstance(overrides, list) else [],
        evaluation=next(filter(None, (_evaluation(storage, split) for split in _SPLITS)), None),
        kept=frozenset(_directories(storage.child(CHECKPOINTS))),
    )


def _lines(storage: Storage, name: str) -> list[Record]:
    try:
        return [line for line in read_lines(storage, name) if isinstance(line, dict)]
    except FileNotFoundError:
        return []


def _text(storage: Storage, name: str) -> str:
    try:
        return storage.read_bytes(name).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _evaluation(storage: Storage, split: str) -> Record | None:
    with contextlib.suppress(FileNotFoundError, ValueError):  # none, or truncated
        found = json.loads(storage.read_bytes(evaluation_file(split)))
        return found if isinstance(found, dict) else None
    return None


def _directories(storage: Storage) -> list[str]:
    path = storage.local_path
    if path is None:
        return storage.list_directories()
    # without pyarrow, whose import takes longer than the rest of a report
    return [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
