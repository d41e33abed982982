"""The schema of `tracker.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ftexp.config.fields import choice, ranged

# the package that each built-in tracker needs
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
    dir: str | None = None  # the run's files lie below it; None: in the run directory, which must be on a disk


@dataclass(kw_only=True)
class MlflowConfig:
    tracking_uri: str | None = None  # None: $MLFLOW_TRACKING_URI, or else mlflow.db under run.storage
    experiment: str = "ftexp"


@dataclass(kw_only=True)
class WandbConfig:
    mode: str = choice("offline", ("offline", "online"))
    project: str = "ftexp"
    entity: str | None = None
    dir: str | None = None  # the run's files lie below it; None: in the run directory, which must be on a disk


@dataclass(kw_only=True)
class PrometheusConfig:
    # http: an endpoint of the driver; ray: next to Ray's own series, by ray.util.metrics, which each node of a cluster
    # exports if it has ray[default]; auto: ray where scaling.address is set, else http
    export: str = choice(AUTO, (AUTO, HTTP, RAY))
    port: int = ranged(9464, low=1, high=65535)  # http: if it is taken, the next free one of 100
    host: str = "127.0.0.1"  # http: where it listens; 0.0.0.0 for a Prometheus on another machine

    def exporter(self, ray_address: str | None) -> str:
        """Return HTTP or RAY for a run that joins the Ray at `ray_address`; None: one of its own."""
        if self.export != AUTO:
            return self.export
        return HTTP if ray_address is None else RAY


@dataclass(kw_only=True)
class TrackerConfig:
    """Trackers: they store metrics besides metrics.jsonl and metrics.csv. Their errors never fail the run."""

    use: dict[str, bool] = field(default_factory=dict)  # {tracker: true}; what tracker=[...] fills
    tags: dict[str, str] = field(default_factory=dict)  # besides ftexp's own: name, git commit, checkpoint, ...
    timeout_s: float = ranged(10.0, above=0)  # for a request, and for the rest when the run ends
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    kwargs: dict[str, Any] = field(default_factory=dict)  # for trackers of your own

    @property
    def names(self) -> list[str]:
        """Names of the trackers in use."""
        return [name for name, used in self.use.items() if used]
