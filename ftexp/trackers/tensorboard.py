"""TensorBoard: event files in the run directory, or below `tracker.tensorboard.dir`.

Every invocation adds a file of its own, and TensorBoard shows a directory's files as one run. The files are read first,
so that a point that any earlier invocation has written isn't written again, whenever that one was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftexp.config.tracker_schema import TrackerConfig
from ftexp.trackers.places import own_directory
from ftexp.trackers.registry import Key, Outcome, Point, TrackedRun, register_tracker

_DESCRIBED = "run"  # tag of the text that describes the run
_MARK = "ftexp_run_id"  # file with the run's id, next to the event files under a shared directory


@register_tracker("tensorboard", package="tensorboard")
class TensorBoardTracker:
    """Scalars by metric and step; config and outcome as text, and as hparams for comparing runs."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        base = config.tensorboard.dir
        directory = (
            own_directory(None, run) / "tensorboard" if base is None else _claimed(own_directory(base, run), run.id)
        )
        self.where = str(directory)
        self._held = set(scalars(directory))
        self._writer: Any = SummaryWriter(self.where)

    def held(self) -> set[Key]:
        """Return the points in the directory's files."""
        return self._held

    def log(self, points: Sequence[Point]) -> None:
        """Write the points, and flush them to the operating system."""
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, point.time)
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """Add the config and the outcome."""
        from torch.utils.tensorboard.summary import hparams

        run = self._run
        facts = {"name": run.name, "status": outcome.status, **run.tags, **outcome.tags}
        rows = "".join(f"| {key} | `{value}` |\n" for key, value in [*facts.items(), *run.params.items()])
        self._writer.add_text(_DESCRIBED, f"| | |\n|-|-|\n{rows}")
        for summary in hparams({key: _plain(value) for key, value in run.params.items()}, outcome.metrics):
            self._writer.file_writer.add_summary(summary)
        self._writer.close()


def _claimed(directory: Path, number: str) -> Path:
    """Return the directory; if it has another run of that name, one next to it, so that their points don't mix."""
    for place in (directory, directory.with_name(f"{directory.name}-{number[:8]}")):
        mark = place / _MARK
        place.mkdir(parents=True, exist_ok=True)
        if not any(place.iterdir()):
            mark.write_text(number)
        if mark.exists() and mark.read_text() == number:
            return place
    raise FileExistsError(f"{place} holds another run: set tracker.tensorboard.dir to another directory")


def _plain(value: Any) -> bool | str | float:
    """Return a value that hparams accept."""
    return value if isinstance(value, (bool, str, int, float)) else json.dumps(value)


def scalars(directory: Path) -> Iterator[Key]:
    """Yield (tag, step) of every scalar in a directory's event files, each up to where a kill has truncated it."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    for file in sorted(directory.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    yield value.tag, event.step
