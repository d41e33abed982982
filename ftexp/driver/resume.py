"""Finding out what a run directory holds before a run begins, or continues, in it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftexp.checkpoint.store import CheckpointStore, locate
from ftexp.config.fields import typed_keys
from ftexp.config.fingerprint import as_begun, differences, fingerprint, stopping_rules
from ftexp.config.masking import flat, masked
from ftexp.config.schema import PREPROCESSING, Config, DataConfig
from ftexp.config.source_names import can_stream
from ftexp.counting import counted
from ftexp.data.info import DataInfo
from ftexp.errors import CheckpointError, ConfigError
from ftexp.rundir.names import CHECKPOINTS, CONFIG_FILE, RUN_FILE
from ftexp.rundir.sample_ledger import last_attempt
from ftexp.rundir.state import RunState, read_state
from ftexp.storage.directory import Storage

# groups of which a resumed run says what changed
_MAY_CHANGE = ("train", "data", "stopping", "hooks", "scaling", "failure", "checkpoint", "schedule")


def has_run(run_dir: Storage) -> bool:
    """Whether a run has begun here."""
    return run_dir.exists(RUN_FILE) or bool(run_dir.child(CHECKPOINTS).list_directories())


def located(uri: str, run_dir: Storage) -> str:
    """Return `resume_from` as an absolute path or URI; ConfigError if a new run finds no checkpoint there."""
    try:
        if not has_run(run_dir):  # a run that has begun has checkpoints of its own
            locate(uri)
    except (CheckpointError, ConfigError, OSError) as error:
        raise ConfigError(f"resume_from={uri}: {error}") from error
    return Storage.at(uri).uri


def require_resumable(config: Config, run_dir: Storage) -> None:
    """ConfigError if `resume` says that there must, or mustn't, be a run already."""
    if config.resume == "auto":
        return
    begun = has_run(run_dir)
    if config.resume == "must" and not begun:
        raise ConfigError(
            f"resume=must, but {run_dir.uri} holds no run: check run.name and run.storage, or set resume=auto"
        )
    if config.resume == "never" and begun:
        raise ConfigError(
            f"resume=never, but {run_dir.uri} holds a run: choose another run.name, or resume it with resume=auto"
        )


def recorded(run_dir: Storage) -> dict[str, Any] | None:
    """Return the fingerprint of the run here, a checkpoint's if run.json is lost; None if there is no run."""
    state = read_state(run_dir)
    if state is not None:
        return state.fingerprint
    manifests = CheckpointStore(run_dir.child(CHECKPOINTS)).manifests(lambda *_: None)
    return manifests[0].fingerprint if manifests else None


def decoding_as_begun(config: Config, run_dir: Storage, typed: Iterable[str]) -> Config:
    """Return the config, with images decoded as the run began to: see `as_begun`; log what differs from new runs."""
    config, older = as_begun(config, recorded(run_dir), typed)
    if older:
        print(f"ftexp: the run is older than {', '.join(older)}: images are decoded as before", file=sys.stderr)
    return config


def open_run(config: Config, run_dir: Storage, run_name: str) -> RunState:
    """The state to resume from; ConfigError if the directory holds a run that is defined otherwise."""
    own = fingerprint(config)
    state = read_state(run_dir)
    if state is None:  # run.json may be lost: the checkpoints still hold their own description
        manifests = CheckpointStore(run_dir.child(CHECKPOINTS)).manifests(lambda *_: None)
        for manifest in manifests[:1]:
            differences(manifest.fingerprint, own, run_dir.uri)
        attempts = max([last_attempt(run_dir), *(manifest.attempt for manifest in manifests)])
        return RunState(name=run_name, fingerprint=own, attempts=attempts)
    try:
        differences(state.fingerprint, own, run_dir.uri)
    except ConfigError:
        if _has_progress(state, run_dir):
            raise
        # it ended before its first step (by a mistake in its config, say): there is nothing to mix with another run
        return RunState(name=run_name, fingerprint=own, attempts=state.attempts)
    train = config.train
    if state.stopped is not None and state.stopped["rules"] != stopping_rules(config):
        state.stopped = None  # what ended it has been changed: the run trains on
    done = state.epoch >= train.epochs or (train.max_steps is not None and state.step >= train.max_steps)
    done = done or state.stopped is not None
    state.status = state.status if state.status == "finished" and done else "running"
    return state


def _has_progress(state: RunState, run_dir: Storage) -> bool:
    return bool(state.step or state.farthest_step or run_dir.child(CHECKPOINTS).list_directories())


def preprocessing_as_begun(config: Config, overrides: Sequence[str], run_dir: Storage) -> Config | None:
    """The config with the preprocessing that its run began with, where the overrides don't set it.

    For runs of pretrained weights. None if no run that has made progress is there.
    """
    before, state = recorded(run_dir), read_state(run_dir)
    if before is None or (state is not None and not _has_progress(state, run_dir)):
        return None
    # a field that isn't recorded is younger than the run, which then began with its default
    begun = {**fingerprint(Config()), **before}
    return _with_data(config, overrides, {name: begun[f"data.{name}"] for name in PREPROCESSING})


def with_preprocessing(config: Config, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    """Return the config with the preprocessing of its weights, where the overrides don't set it.

    Images of a source in memory are neither cropped nor scaled, so that mean and std are all they take.
    """
    own = values if can_stream(config.data.name) else {name: values[name] for name in ("mean", "std") if name in values}
    return _with_data(config, overrides, own)


def _with_data(config: Config, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    """Return the config with these fields of `data`, where the overrides don't set them."""
    typed = typed_keys(overrides)
    own = {name: value for name, value in values.items() if f"data.{name}" not in typed}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **own))


def changes(config: Config, state: RunState, run_dir: Storage) -> list[str]:
    """Return what is different from the run's last invocation, a line each: of what may change (see `fingerprint`).

    [] for a new run, and where config.yaml can't be read.
    """
    epochs, lines = config.train.epochs, []
    if state.epoch > epochs:
        trained = counted(state.epoch, "epoch")
        lines.append(f"train.epochs={epochs}: the run has trained {trained} already, so no more is trained")
    try:
        stored = OmegaConf.to_container(OmegaConf.create(run_dir.read_bytes(CONFIG_FILE).decode()))
    except (OSError, ValueError, OmegaConfBaseException, YAMLError):
        return lines
    before: dict[str, Any] = dict(flat(dict(stored), "")) if isinstance(stored, dict) else {}  # type: ignore[arg-type]
    now = dict(flat(masked({name: getattr(config, name) for name in _MAY_CHANGE}), ""))
    changed = [key for key in sorted(now) if key in before and before[key] != now[key]]
    return [*lines, *(f"{key} was {before[key]}, is {now[key]}" for key in changed)]


def labels_as_begun(data: DataConfig, before: Mapping[str, Any]) -> DataConfig:
    """The same, where whole numbers as labels mean what they meant when the run began.

    before: the fields of the run's DataInfo; none for a new run. Runs without `integer_labels` began before there was
    a choice.
    """
    if not before:
        return data
    return dataclasses.replace(data, integer_labels=before.get("integer_labels", DataInfo.integer_labels))


def require_same_data(config: Config, state: RunState, info: DataInfo) -> None:
    """ConfigError if the run began with other samples: which one comes when depends on their number and order."""
    before, now = state.data.get("num_samples", {}).get("train"), info.num_samples["train"]
    earlier = _listed_otherwise(state.data)
    if before is not None and before != now:
        raise ConfigError(
            f"data.name={config.data.name} has {now:,} training samples now, and had {before:,} when the run began: "
            "restore the data, or start another run (resume_from=... keeps the weights). Samples that can't "
            "be read count when they are streamed, and don't when they are cached: so data.feed must stay as it was "
            f"too{earlier}"
        )
    if _are_others(state.data.get("digest"), info.digest):
        raise ConfigError(
            f"data.name={config.data.name} has as many training samples as when the run began, but not the same ones: "
            "their names, labels or splits differ. Restore the data, or start another run (resume_from=... "
            f"keeps the weights){earlier}"
        )


def repeated_samples(config: Config, info: DataInfo) -> str | None:
    """Return a warning if a global batch is larger than the training split; None if it isn't."""
    batch, samples = config.train.global_batch_size, info.num_samples["train"]
    if batch <= samples:
        return None
    return (
        f"train.global_batch_size={batch:,} is more than the {samples:,} training samples: one step trains on each "
        f"up to {math.ceil(batch / samples)} times. Lower it"
    )


def require_shared_statistics(config: Config, info: DataInfo) -> None:
    """ConfigError if batch norm's means over ranks are asked for, which a validation takes, and there is none."""
    if config.train.dist_bn == "reduce" and not info.num_samples["val"]:
        raise ConfigError(
            "train.dist_bn=reduce takes means over ranks before each validation, and the data have no validation "
            "split: raise data.val_fraction, or take train.dist_bn=broadcast"
        )


def require_trained_on(what: str, before: Mapping[str, Any], now: str | None) -> None:
    """ConfigError if a data set isn't the one that a run was cut into splits from.

    Args:
        what: names the data set in the error.
        before: the fields of the run's DataInfo.
        now: the digest of the listing of the data set.
    """
    if _are_others(before.get("digest"), now):
        raise ConfigError(
            f"{what} doesn't hold the samples any more that the run was trained on: their names, labels or splits "
            "differ, so what would be its test split may have been trained on. Restore the data, or predict "
            f"with data=... split=all{_listed_otherwise(before)}"
        )


def _listed_otherwise(data: Mapping[str, Any]) -> str:
    """Return what else may have changed the samples of a run: an earlier ftexp listed other entries."""
    if data.get("excluded") is not None:
        return ""
    return (
        ". If the data has not changed: an earlier ftexp began the run; it took files without an image extension, in "
        "system directories and in directory cycles for samples, and missed shard entries with a dot in their name. "
        "Resume the run with that version, or begin another run"
    )


def _are_others(before: str | None, now: str | None) -> bool:
    """Whether digests of two listings differ, where both are known."""
    return None not in (before, now) and before != now
