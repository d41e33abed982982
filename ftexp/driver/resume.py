"""Checks of a run directory, and of the config against it, before a run starts or resumes there."""

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

# groups whose changes a resumed run prints
_MAY_CHANGE = ("train", "data", "stopping", "hooks", "scaling", "failure", "checkpoint", "schedule")


def has_run(run_dir: Storage) -> bool:
    """Return whether the directory holds a run."""
    return run_dir.exists(RUN_FILE) or bool(run_dir.child(CHECKPOINTS).list_directories())


def located(uri: str, run_dir: Storage) -> str:
    """Return `resume_from` as an absolute path or URI; ConfigError if a new run finds no checkpoint there."""
    try:
        if not has_run(run_dir):  # an existing run resumes from its own checkpoints
            locate(uri)
    except (CheckpointError, ConfigError, OSError) as error:
        raise ConfigError(f"resume_from={uri}: {error}") from error
    return Storage.at(uri).uri


def require_resumable(config: Config, run_dir: Storage) -> None:
    """Raise ConfigError if `resume` demands a run and there is none, or forbids one and there is one."""
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
    """Return the fingerprint of the run here, from a checkpoint if run.json is lost; None if there is no run."""
    state = read_state(run_dir)
    if state is not None:
        return state.fingerprint
    manifests = CheckpointStore(run_dir.child(CHECKPOINTS)).manifests(lambda *_: None)
    return manifests[0].fingerprint if manifests else None


def decoding_as_begun(config: Config, run_dir: Storage, typed: Iterable[str]) -> Config:
    """Return the config with the decoding that the run started with, see `as_begun`; print how new runs differ."""
    config, older = as_begun(config, recorded(run_dir), typed)
    if older:
        print(f"ftexp: the run is older than {', '.join(older)}: images are decoded as before", file=sys.stderr)
    return config


def open_run(config: Config, run_dir: Storage, run_name: str) -> RunState:
    """Return the state to start or resume from; ConfigError if the directory holds a different run."""
    own = fingerprint(config)
    state = read_state(run_dir)
    if state is None:  # run.json may be lost; each checkpoint holds the fingerprint too
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
        # it ended before its first step, for example by an error in its config: there is nothing to resume
        return RunState(name=run_name, fingerprint=own, attempts=state.attempts)
    train = config.train
    if state.stopped is not None and state.stopped["rules"] != stopping_rules(config):
        state.stopped = None  # the rules that ended it have changed: it continues to train
    done = state.epoch >= train.epochs or (train.max_steps is not None and state.step >= train.max_steps)
    done = done or state.stopped is not None
    state.status = state.status if state.status == "finished" and done else "running"
    return state


def _has_progress(state: RunState, run_dir: Storage) -> bool:
    return bool(state.step or state.farthest_step or run_dir.child(CHECKPOINTS).list_directories())


def preprocessing_as_begun(config: Config, overrides: Sequence[str], run_dir: Storage) -> Config | None:
    """Return the config with the preprocessing that its run started with, where the overrides don't set it.

    For runs with pretrained weights. None if the directory holds no run with progress.
    """
    before, state = recorded(run_dir), read_state(run_dir)
    if before is None or (state is not None and not _has_progress(state, run_dir)):
        return None
    # a field that isn't recorded was added after the run started; the run used its default
    begun = {**fingerprint(Config()), **before}
    return _with_data(config, overrides, {name: begun[f"data.{name}"] for name in PREPROCESSING})


def with_preprocessing(config: Config, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    """Return the config with the preprocessing of its weights, where the overrides don't set it.

    For a source in memory, only mean and std apply: its images are neither cropped nor scaled.
    """
    own = values if can_stream(config.data.name) else {name: values[name] for name in ("mean", "std") if name in values}
    return _with_data(config, overrides, own)


def _with_data(config: Config, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    """Return the config with these fields of `data`, where the overrides don't set them."""
    typed = typed_keys(overrides)
    own = {name: value for name, value in values.items() if f"data.{name}" not in typed}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **own))


def changes(config: Config, state: RunState, run_dir: Storage) -> list[str]:
    """Return a line for each setting that differs from the run's last invocation; only of groups in _MAY_CHANGE.

    Also a line if the run has already trained more than train.epochs. Nothing is compared for a new run, or if
    config.yaml can't be read.
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
    """Return `data` with the meaning of integer labels that the run started with.

    before: the fields of the run's DataInfo; empty for a new run. Without `integer_labels`, the run is older than the
    choice between meanings.
    """
    if not before:
        return data
    return dataclasses.replace(data, integer_labels=before.get("integer_labels", DataInfo.integer_labels))


def require_same_data(config: Config, state: RunState, info: DataInfo) -> None:
    """Raise ConfigError if the run started with other samples: their order depends on their number and listing."""
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
    """Return a warning if a global batch is larger than the training split; None otherwise."""
    batch, samples = config.train.global_batch_size, info.num_samples["train"]
    if batch <= samples:
        return None
    return (
        f"train.global_batch_size={batch:,} is more than the {samples:,} training samples: one step trains on each "
        f"up to {math.ceil(batch / samples)} times. Lower it"
    )


def require_shared_statistics(config: Config, info: DataInfo) -> None:
    """Raise ConfigError if train.dist_bn=reduce and there is no validation, before which it averages over ranks."""
    if config.train.dist_bn == "reduce" and not info.num_samples["val"]:
        raise ConfigError(
            "train.dist_bn=reduce takes means over ranks before each validation, and the data have no validation "
            "split: raise data.val_fraction, or take train.dist_bn=broadcast"
        )


def require_trained_on(what: str, before: Mapping[str, Any], now: str | None) -> None:
    """Raise ConfigError if a data set isn't the one whose splits a run was trained on.

    Args:
        what: name of the data set in the error.
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
    """Return a hint if an earlier version of ftexp, which listed other entries, started the run; otherwise ""."""
    if data.get("excluded") is not None:
        return ""
    return (
        ". If the data has not changed: an earlier ftexp began the run; it took files without an image extension, in "
        "system directories and in directory cycles for samples, and missed shard entries with a dot in their name. "
        "Resume the run with that version, or begin another run"
    )


def _are_others(before: str | None, now: str | None) -> bool:
    """Return whether two digests of listings are known and differ."""
    return None not in (before, now) and before != now
