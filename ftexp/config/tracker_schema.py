"""The schema of `tracker.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ftexp.config.fields import choice, ranged

TRACKER_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}  # what each of ftexp's needs


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
class TrackerConfig:
    """What keeps the metrics beside metrics.jsonl and metrics.csv. What is wrong with a tracker never fails a run."""

    use: dict[str, bool] = field(default_factory=dict)  # {tracker: true}; what tracker=[...] fills
    tags: dict[str, str] = field(default_factory=dict)  # beside ftexp's own: name, git commit, checkpoint, ...
    timeout_s: float = ranged(10.0, above=0)  # of one request, and of what is still to be sent when the run ends
    tensorboard: TensorBoardConfig = field(default_factory=TensorBoardConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    kwargs: dict[str, Any] = field(default_factory=dict)  # for trackers of your own

    @property
    def names(self) -> list[str]:
        """Of the trackers in use."""
        return [name for name, used in self.use.items() if used]
