"""A trained run, for commands that use its config, the facts of its data or its weights."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ftexp.checkpoint.manifest import Manifest
from ftexp.checkpoint.store import CheckpointStore
from ftexp.cli.compose import to_config
from ftexp.config.schema import BESIDE, Config, DataConfig
from ftexp.config.source_names import AS_TRAINED, OF_DECODING, can_stream
from ftexp.data.info import DataInfo
from ftexp.data.root import is_missing
from ftexp.errors import CheckpointError, ConfigError
from ftexp.rundir.names import CHECKPOINTS, CONFIG_FILE, METRICS_FILE
from ftexp.rundir.state import read_state
from ftexp.storage.append_log import read_lines
from ftexp.storage.directory import Storage

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class SavedRun:
    """An opened run directory."""

    storage: Storage
    config: Config
    info: DataInfo  # facts of the data that it was trained on

    @classmethod
    def at(cls, uri: str) -> SavedRun:
        """Open a run; ConfigError if there is none, or if it has never started training."""
        storage = Storage.at(uri)
        config = load_run_config(storage)
        state = read_state(storage)
        if state is None or not state.data:
            raise ConfigError(
                f"run={storage.uri} holds no run.json with facts of the data: give a run that has trained"
            )
        known = {field.name for field in dataclasses.fields(DataInfo)}
        info = DataInfo(**{key: value for key, value in state.data.items() if key in known})
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, integer_labels=info.integer_labels))
        return cls(storage, config, info)

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self.storage.child(CHECKPOINTS))

    def model(self, weights: dict[str, Tensor]) -> nn.Module:
        """Return the model with these weights (a state dict), in evaluation mode, on the CPU. Imports torch."""
        from ftexp.model.build import trained_model
        from ftexp.registry import load_plugins

        load_plugins(self.config.plugins)
        return trained_model(self.config.model, self.info, weights).eval()

    def data_as_seen(self, data: DataConfig) -> DataConfig:
        """Return `data` with the run's cropping, scaling, normalisation and label format."""
        decoded = can_stream(data.name)  # otherwise images are in memory as the model sees them
        names = [name for name in AS_TRAINED if decoded or name not in OF_DECODING]
        seen: dict[str, Any] = {name: getattr(self.config.data, name) for name in names}
        if not decoded:
            defaults = DataConfig()
            seen |= {name: getattr(defaults, name) for name in OF_DECODING}
        seen["decode_size"] = None  # only training crops a part of an image
        return dataclasses.replace(data, integer_labels=self.info.integer_labels, **seen)


def load_run_config(storage: Storage) -> Config:
    """Return the config of a run directory; ConfigError if there is no run."""
    try:
        text = storage.read_bytes(CONFIG_FILE).decode()
    except OSError as error:
        raise ConfigError(f"run={storage.uri} holds no config.yaml: give the directory of a run") from error
    return to_config(OmegaConf.create(text))  # type: ignore[arg-type]


def file_name_of(data: DataConfig) -> str:
    """Return a name of a data set for file names: the last part of its root, or its source."""
    name = (data.root or "").partition("?")[0].rstrip("/").rpartition("/")[2] or data.name
    return re.sub(r"[^\w.-]+", "_", name)


def require_data(data: DataConfig) -> None:
    """Raise ConfigError if a run's data is no longer where it was on disk."""
    if is_missing(data):
        raise ConfigError(f"data.root={data.root}, the run's data, does not exist: add data.root=<where it is now>")


def choose(store: CheckpointStore, wanted: str, run_config: Config) -> Manifest:
    """Return the manifest of the best, the latest, or a named checkpoint; CheckpointError if there is none."""
    if wanted not in ("best", "latest"):
        return store.by_name(wanted)
    manifests = store.manifests(lambda name, reason: print(f"! {name}: {reason}", file=sys.stderr))
    if wanted == "best":
        sign = 1 if run_config.checkpoint.checkpoint_score_order == "max" else -1
        scores = _scores(store, manifests, run_config)
        scored = [manifest for manifest in manifests if scores.get(manifest.name) is not None]
        # a checkpoint between two evaluations repeats the previous value: of equal ones, the first was evaluated
        manifests = sorted(scored, key=lambda each: (-sign * scores[each.name], each.step)) or manifests
    if not manifests:
        raise CheckpointError(f"{store.storage.uri} holds no checkpoint yet")
    return manifests[0]


def _scores(store: CheckpointStore, manifests: list[Manifest], run_config: Config) -> dict[str, float]:
    """Return the value of the metric that ranks checkpoints, by checkpoint.

    A logged point of the checkpoint's step comes first: with train.eval=beside, manifests have no current value.
    """
    metric = run_config.checkpoint.checkpoint_score_attribute
    try:
        points = read_lines(store.storage.parent, METRICS_FILE)
    except FileNotFoundError:
        points = []
    logged = {point["step"]: point[metric] for point in points if point.get(metric) is not None}
    of_manifests = {each.name: each.metrics[metric] for each in manifests if each.metrics.get(metric) is not None}
    of_points = {each.name: logged[each.step] for each in manifests if each.step in logged}
    return of_points if run_config.train.eval == BESIDE else of_manifests | of_points
