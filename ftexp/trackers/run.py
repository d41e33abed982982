"""The trackers of one run, or of a sweep as a whole: opened, fed and closed together."""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ftexp.trackers.builtin  # noqa: F401 - registers them
from ftexp.config.masking import flat, masked
from ftexp.config.schema import Config
from ftexp.config.tracker_schema import TrackerConfig
from ftexp.rundir.names import TRACKERS_FILE
from ftexp.storage.directory import Storage
from ftexp.trackers.figures import Figure
from ftexp.trackers.follower import Follower, Report
from ftexp.trackers.registry import Outcome, Point, TrackedRun, trackers
from ftexp.wire.events import TrackerFailed, TrackerOpened

_GIT_TIMEOUT_S = 5.0


class Trackers:
    """The trackers of `tracker=...`, or only `names` of them. After construction, nothing here raises or blocks.

    run: None if there are no trackers.
    points: reads the run's points so far, as metrics.jsonl has them.
    UnknownNameError if a name isn't registered.
    """

    def __init__(
        self,
        config: TrackerConfig,
        run: TrackedRun | None,
        directory: Storage,
        points: Callable[[], Iterable[dict[str, Any]]],
        names: Sequence[str] | None = None,
    ) -> None:
        self._config, self._run, self._directory, self._points = config, run, directory, points
        self._chosen = {name: trackers.get(name) for name in (config.names if names is None else names)}
        self._followers: list[Follower] = []
        self._end = 0.0  # time.monotonic() until which `wait` waits

    def start(self, report: Report) -> None:
        """Start feeding the trackers; `report` is called with each of their events."""
        if self._chosen:
            self._note_complete(set())
        for name, registered in self._chosen.items():
            assert self._run is not None, "there are trackers"
            make = functools.partial(registered.make, self._config, self._run)
            self._followers.append(Follower(name, make, self._read, report))

    def _read(self) -> list[Point]:
        return [Point.of(line) for line in self._points()]

    def offer(self, line: dict[str, Any]) -> None:
        """Pass a new line of metrics.jsonl to the trackers, without waiting."""
        if self._followers:
            point = Point.of(line)
            for follower in self._followers:
                follower.offer(point)

    def end(self, outcome: Outcome) -> None:
        """Pass the outcome to the trackers after the last point, without waiting."""
        self._end = time.monotonic() + self._config.timeout_s
        for follower in self._followers:
            follower.end(outcome)

    def wait(self) -> list[TrackerOpened | TrackerFailed]:
        """Wait for deliveries until `tracker.timeout_s` after `end`; return unreported openings and final failures."""
        failures = [follower.wait(max(0.0, self._end - time.monotonic())) for follower in self._followers]
        if self._followers:
            done = {follower.name for follower in self._followers if follower.complete}
            with contextlib.suppress(OSError):  # then they are only asked again needlessly
                self._note_complete(done)
        events = [*(follower.unheard for follower in self._followers), *failures]
        return [event for event in events if event is not None]

    def _note_complete(self, done: set[str]) -> None:
        assert self._run is not None, "there are trackers"
        _write(self._directory, self._run.id, read_complete(self._directory) - {*self._chosen} | done)


def check_names(names: Sequence[str]) -> None:
    """Raise UnknownNameError if any of `names` is not registered."""
    for name in names:
        trackers.get(name)


def tracked_run(
    config: Config,
    directory: Storage,
    name: str,
    started: float,
    sweep: Storage | None = None,
    params: dict[str, Any] | None = None,
    figures: Callable[[], list[Figure]] = list,
) -> TrackedRun:
    """Return the facts of the run in `directory`, or of a sweep if `params` is given.

    sweep: directory of the sweep that the run is a trial of. It is two levels below the sweep's `run.storage`; a
    trial's own `run.storage` is the sweep's directory.

    Creates the run's id and stores it in the directory, if there is none yet.
    """
    tags = {"run_dir": shown(directory), "git_commit": git_commit(), "sweep": sweep.name if sweep is not None else None}
    return TrackedRun(
        id=tracking_id(directory),
        name=name,
        uri=directory.uri,
        params=params if params is not None else dict(flat(masked(config), "")),
        tags={**{key: value for key, value in tags.items() if value is not None}, **masked(config.tracker.tags)},
        started=started,
        storage=config.run.storage if sweep is None and params is None else (sweep or directory).parent.parent.uri,
        sweep=sweep.name if sweep is not None else None,
        sweep_id=tracking_id(sweep) if sweep is not None else None,
        figures=figures,
        ray_address=config.scaling.address,
    )


def shown(directory: Storage) -> str:
    """Return the path or URI of a directory, with secrets masked."""
    return directory.uri if directory.local_path is not None else str(masked(directory.uri))


def tracking_id(directory: Storage) -> str:
    """Return the id of the run in `directory`, used in every tracker; it is stored before any tracker is opened."""
    content = _content(directory)
    if "id" not in content:
        content = _write(directory, secrets.token_hex(8), set())
    return str(content["id"])


def read_complete(directory: Storage) -> set[str]:
    """Return the names of trackers that have all points of the run in `directory`, and its outcome."""
    return set(_content(directory).get("complete", ()))


def _content(directory: Storage) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(directory.read_bytes(TRACKERS_FILE))
    except FileNotFoundError:
        return {}
    return content


def _write(directory: Storage, number: str, complete: set[str]) -> dict[str, Any]:
    content = {"id": number, "complete": sorted(complete)}
    directory.write_bytes(TRACKERS_FILE, json.dumps(content).encode())
    return content


def git_commit() -> str | None:
    """Return the commit of the working directory; None without git or without a repository."""
    try:
        words = ["git", "rev-parse", "HEAD"]
        found = subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
