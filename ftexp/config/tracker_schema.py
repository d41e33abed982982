"""The schema of `tracker.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ftexp.config.fields import choice, ranged

# package required by each built-in tracker
TRACKER_PACKAGES = {
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "prometheus": "prometheus_client",
}
AUTO = "auto"
HTTP, RAY = "http", "ray"


@dataclass(kw_only=True)
class TensorBoardConfig:
    dir: str | None = None  # parent of the run's files; None: the run directory, which must be on a local disk


@dataclass(kw_only=True)
class MlflowConfig:
    tracking_uri: str | None = None  # None: $MLFLOW_TRACKING_URI if set, else mlflow.db under run.storage
    experiment: str = "ftexp"


@dataclass(kw_only=True)
class WandbConfig:
    mode: str = choice("offline", ("offline", "online"))
    project: str = "ftexp"
    entity: str | None = None
    dir: str | None = None  # parent of the run's files; None: the run directory, which must be on a local disk


@dataclass(kw_only=True)
class PrometheusConfig:
    # http: an endpoint of the driver; ray: with Ray's own metrics, by ray.util.metrics, which each node of a cluster
    # exports if ray[default] is installed; auto: ray if scaling.address is set, else http
    export: str = choice(AUTO, (AUTO, HTTP, RAY))
    port: int = ranged(9464, low=1, high=65535)  # http: if the port is in use, the next free one of 100 is used
    host: str = "127.0.0.1"  # http: listening address; 0.0.0.0 for a Prometheus on another machine

    def exporter(self, ray_address: str | None) -> str:
        """Return HTTP or RAY for a run that joins the Ray at `ray_address`; None: the run starts its own Ray."""
        if self.export != AUTO:
            return self.export
        return HTTP if ray_address is None else RAY


@dataclass(kw_only=True)
class TrackerConfig:
    """Trackers, which store metrics in addition to metrics.jsonl and metrics.csv. Their errors never fail the run."""

    use: dict[str, bool] = field(default_factory=dict)  # {tracker: true}; set by tracker=[...]
    tags: dict[str, str] = field(default_factory=dict)  # added to ftexp's own: name, git commit, checkpoint, ...
    timeout_s: float = ranged(10.0, above=0)  # for one request, and for all pending ones when the run ends
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    kwargs: dict[str, Any] = field(default_factory=dict)  # for your own trackers

    @property
    def names(self) -> list[str]:
        """Names of the trackers in use."""
        return [name for name, used in self.use.items() if used]
