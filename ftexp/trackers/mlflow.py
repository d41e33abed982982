"""MLflow: one run on a server or in a database; a sweep's trials are children of one run.

A run is found by its tag `ftexp.id`; the id is stored before the run is created. Its metrics are read before any are
sent. MLflow's databases store each (metric, time, step, value) once, however often it arrives. So even a request that a
server executes after its client gave up adds nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftexp.config.tracker_schema import TrackerConfig
from ftexp.storage.directory import Storage
from ftexp.storage.uri import is_remote
from ftexp.trackers.registry import Key, Outcome, Point, TrackedRun, register_tracker

ID, PARENT = "ftexp.id", "mlflow.parentRunId"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_PARAMS, _MAX_METRICS = 100, 1000  # limits of one request
_REFUSED = re.compile(r"[^/\w.\- :]")
_MAX_PARAM_CHARS = 500  # characters of a param: the length that every version and store accepts


@register_tracker("mlflow", package="mlflow", has_parents=True)
class MlflowTracker:
    """Metrics by step; the config as params; the outcome as tags."""

    def __init__(self, config: TrackerConfig, run: TrackedRun) -> None:
        _prepare(config.timeout_s)
        from mlflow import MlflowClient

        self._run = run
        uri = tracking_uri(config.mlflow.tracking_uri, run.storage)
        self._client: Any = MlflowClient(uri)
        self._experiment = self._find_experiment(config.mlflow.experiment)
        found = self._find(run.id) or self._create()
        self._id = found.info.run_id
        self.where = f"{uri}, experiment {config.mlflow.experiment}, run {self._id}"
        self._metrics = list(found.data.metrics)
        self._describe(found.data.params)
        self._has_parent = PARENT in found.data.tags
        self._adopt()
        if found.info.status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")

    def held(self) -> set[Key]:
        """Return the points that the server has."""
        found = [metric for name in self._metrics for metric in self._client.get_metric_history(self._id, name)]
        return {(metric.key, metric.step) for metric in found}

    def log(self, points: Sequence[Point]) -> None:
        """Send the points; the server has stored them when this returns."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(1000 * point.time), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MAX_METRICS], synchronous=True)

    def close(self, outcome: Outcome) -> None:
        """Log the outcome."""
        self._adopt()
        self._tag({"status": outcome.status, **outcome.tags})
        self._client.set_terminated(self._id, _STATUS[outcome.status])

    def _find_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run may have created it meanwhile
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _find(self, number: str) -> Any:
        found = self._client.search_runs([self._experiment], f"tags.`{ID}` = '{number}'", max_results=1)
        return found[0] if found else None

    def _create(self) -> Any:
        run = self._run
        tags = {ID: run.id, **{_allowed(key): value for key, value in run.tags.items()}}
        if "git_commit" in tags:
            tags["mlflow.source.git.commit"] = tags["git_commit"]
        return self._client.create_run(self._experiment, round(1000 * run.started), tags, run.name)

    def _describe(self, recorded: dict[str, str]) -> None:
        """Log the config. MLflow never changes a param: a value that differs from the recorded one becomes a tag."""
        from mlflow.entities import Param

        wanted = {_allowed(key): str(value)[:_MAX_PARAM_CHARS] for key, value in self._run.params.items()}
        new = [Param(key, value) for key, value in wanted.items() if key not in recorded]
        for start in range(0, len(new), _MAX_PARAMS):
            self._client.log_batch(self._id, params=new[start : start + _MAX_PARAMS], synchronous=True)
        self._tag({f"now.{key}": value for key, value in wanted.items() if recorded.get(key, value) != value})

    def _adopt(self) -> None:
        """Make the run a child of its sweep's run, if it is a trial and once that run exists."""
        if self._run.sweep_id is None or self._has_parent:
            return
        if (parent := self._find(self._run.sweep_id)) is not None:
            self._tag({PARENT: parent.info.run_id})
            self._has_parent = True

    def _tag(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            given = [RunTag(_allowed(key), value) for key, value in tags.items()]
            self._client.log_batch(self._id, tags=given, synchronous=True)


def _allowed(key: str) -> str:
    """Return a key that MLflow accepts: a pattern of layer names, for example, has characters that it refuses."""
    return _REFUSED.sub("_", key)


def tracking_uri(configured: str | None, storage: str) -> str:
    """Return the URI of the server; by default a database under `storage`, which must be on a disk."""
    if uri := configured or os.environ.get("MLFLOW_TRACKING_URI"):
        return str(Path(uri).expanduser()) if uri.startswith("~") else uri
    assert not is_remote(storage), "checks ask for a URI then"
    return f"sqlite:///{Storage.at(storage).uri}/mlflow.db"


def _prepare(timeout_s: float) -> None:
    """Set variables that MLflow reads at import or at each request; the user's values are kept."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(timeout_s)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the follower retries, and asks what has arrived
    }.items():
        os.environ.setdefault(name, value)
