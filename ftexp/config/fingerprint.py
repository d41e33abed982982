"""The settings that define a run; a run can't resume with different ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ftexp.config.fields import typed_keys
from ftexp.config.masking import flat, masked
from ftexp.config.schema import AUTO, Config, DistillConfig
from ftexp.errors import ConfigError

# Model, data, optimiser, seed and batch define a run. Epochs, workers, logging, failure and checkpoint settings may
# change between invocations.
_DEFINING = (
    *("seed", "resume_from", "model", "data", "augment", "resizing"),
    *("loss", "optim", "ema", "distill", "schedule"),
)
_DEFINING_TRAIN = (
    *("global_batch_size", "precision", "label_smoothing", "freeze"),
    *("sync_bn", "dist_bn"),
    *("clip_grad_norm", "clip_grad_value", "clip_grad_agc"),
)
# The kind of parallelism may change: like the number of workers, it affects rounding only. The dtypes of computation
# define a run, as train.precision does.
_DEFINING_PARALLEL = ("param_dtype", "reduce_dtype")
# The location of the data, and how it is read, may change. The meaning of integer labels is recorded with the data, and
# so is a cached data set without its bad samples, which counts as a different data set.
_FREE_DATA = ("root", "download", "feed", "decode_cpus", "prefetch_batches", "integer_labels", "on_bad_sample")
_FREE_OPTIM = ("lr_base", "lr_base_size", "lr_base_scale")  # they only determine optim.lr
# fields of distill with the location of weights that have a known hash: of a timm name; of a run or a file
_PLACES_OF_TEACHER = (("pretrained",), ("teacher", "checkpoint", "weights"))
# fields of data whose value in group files, for new runs, differs from the behaviour of runs older than these fields
_OF_NEW_RUNS = ("decoder", "exif_orientation", "background")


def fingerprint(config: Config) -> dict[str, Any]:
    """Return {dotted key: value} of everything that defines the run."""
    values = dataclasses.asdict(config)
    chosen = {name: values[name] for name in _DEFINING}
    chosen["train"] = {name: values["train"][name] for name in _DEFINING_TRAIN}
    chosen["parallel"] = {name: values["parallel"][name] for name in _DEFINING_PARALLEL}
    for name in _FREE_DATA:
        del chosen["data"][name]
    del chosen["model"]["pretrained_partial"]  # only allows or refuses training
    if config.distill.sha256 is not None:  # the hash identifies the weights, so their path may change
        for name in _PLACES_OF_TEACHER[config.distill.pretrained is True]:
            chosen["distill"][name] = getattr(DistillConfig(), name)
    for name in _FREE_OPTIM:
        del chosen["optim"][name]
    del chosen["schedule"]["cooldown_epochs"]  # may change, as train.epochs may
    chosen["data"]["decoder"] = config.data.decoder_name
    defining: dict[str, Any] = masked(dict(flat(chosen, "")))
    return defining


def stopping_rules(config: Config) -> dict[str, Any]:
    """Return the settings that can end a run early. If they change, a finished run resumes training."""
    rules: dict[str, Any] = masked({"stopping": dataclasses.asdict(config.stopping), "hooks": config.hooks})
    return rules


def as_begun(config: Config, recorded: Mapping[str, Any] | None, typed: Iterable[str]) -> tuple[Config, list[str]]:
    """Return `config` with the decoding that the run started with, unless overridden; resolves data.decoder=auto.

    Args:
        config: config of this invocation.
        recorded: fingerprint with which the run directory was created; None for a new run.
        typed: overrides of this invocation.

    Returns:
        The config, and the keys that didn't exist when the run started and whose value differs from a new run's.
    """
    if recorded is None:
        return dataclasses.replace(config, data=dataclasses.replace(config.data, decoder=config.data.decoder_name)), []
    keys = typed_keys(typed)
    older, begun, data = list[str](), dict[str, Any](), Config().data
    for name in _OF_NEW_RUNS:
        key, value, default = f"data.{name}", getattr(config.data, name), getattr(data, name)
        if value == AUTO and name == "decoder":
            begun[name] = recorded.get(key, default)
        elif key not in recorded and key not in keys:
            begun[name] = default
        if key not in recorded and begun.get(name, value) != value:
            older.append(key)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **begun)), older


def differences(recorded: dict[str, Any], own: dict[str, Any], location: str) -> None:
    """Raise ConfigError with the differing keys if `own` differs from the fingerprint `recorded` in the run directory.

    A schema key that is not recorded was added after the run started; the run used its default.
    """
    before = {**fingerprint(Config()), **recorded}
    changed = [
        f"{key} was {before.get(key)!r}, and is {own.get(key)!r} now"
        for key in sorted({*recorded, *own})
        if before.get(key) != own.get(key)
    ]
    if recorded and changed:
        raise ConfigError(
            "\n".join(
                [
                    f"{location} holds a run with a different configuration; choose another run.name, or restore "
                    "these values:",
                    *changed,
                ]
            )
        )
