"""Weights & Biases: one run, found by its id. Offline, each invocation leaves a directory; `wandb sync` joins them.

wandb's own process writes logged points to a file, run-<id>.wandb, also in online mode. These files are read before
anything is logged, so that no point is logged twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftexp.config.tracker_schema import TrackerConfig
from ftexp.trackers.places import own_directory
from ftexp.trackers.registry import Key, Outcome, Point, TrackedRun, register_tracker
from ftexp.trackers.wandb_log import records

_STEP = "step"  # the x axis. Not wandb's `_step`, which must grow with each row: a step may have a row for each split
_INHERITED = "WANDB_SERVICE"  # variable in which wandb passes its service process to the processes that it starts
_FLUSH_EVERY_S = 1.0
_MAX_TAG_CHARS = 64


@register_tracker("wandb", package="wandb")
class WandbTracker:
    """A row for each point; the config; the outcome as summary."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means offline
        # the service of another process; after a kill, it would still hold the run: "run ID is in use"
        os.environ.pop(_INHERITED, None)
        import wandb

        mode: Any = config.wandb.mode
        directory = own_directory(config.wandb.dir, run)
        directory.mkdir(parents=True, exist_ok=True)  # otherwise wandb uses another directory
        rows = list(logged_rows(directory, run.id))
        self._held = {(name, row[_STEP]) for row in rows for name in row}
        self._run: Any = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            id=run.id,
            name=run.name,
            group=run.sweep,
            tags=[f"{key}={value}"[:_MAX_TAG_CHARS] for key, value in config.tags.items()],
            config={**run.params, **run.tags},
            dir=str(directory),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                console="off",  # don't capture the run's output
                silent=True,
                reinit="create_new",
                init_timeout=config.timeout_s,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_save_requirements=False,
                x_transaction_log_flush_interval=_FLUSH_EVERY_S,
            ),
        )
        self._run.define_metric("*", step_metric=_STEP)
        self._next = max([self._run.step, *(row["_step"] + 1 for row in rows)])
        self.where = self._run.url if mode == "online" else str(directory / "wandb")

    def held(self) -> set[Key]:
        """Return the points in wandb's files."""
        return self._held

    def log(self, points: Sequence[Point]) -> None:
        """Pass the points to wandb's process, which writes them even if this one dies."""
        for point in points:
            self._run.log({_STEP: point.step, "epoch": point.epoch, **point.values}, step=self._next, commit=True)
            self._next += 1

    def close(self, outcome: Outcome) -> None:
        """Log the outcome, and wait until wandb has written everything."""
        self._run.summary.update({"status": outcome.status, **outcome.tags})
        self._run.finish(exit_code=0 if outcome.status == "finished" else 1)


def logged_rows(directory: Path, number: str) -> Iterator[dict[str, Any]]:
    """Yield every row of history in wandb's files of the run with this id, including `_step`."""
    from wandb.proto.wandb_internal_pb2 import Record

    # a directory that is created in the same second as another has -1 appended to its name
    for file in sorted(directory.glob(f"wandb/*run-*-{number}*/run-{number}.wandb")):
        for content in records(file.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                yield {name: json.loads(value) for name, value in row.items()}
