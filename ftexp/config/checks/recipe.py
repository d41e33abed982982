"""Checks of the training recipe: optimiser, schedule, loss, EMA, freezing.

Each check yields one message per mistake; `validate` runs them. A setting that another one disables is an error too: it
would be silently ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import MISSING

from ftexp.config.checks.wording import unregistered, unused
from ftexp.config.fields import typed_keys
from ftexp.config.machine import num_local_gpus
from ftexp.config.masking import flat
from ftexp.config.schema import (
    AUTO,
    BESIDE,
    CLASS_WEIGHTS,
    LOSSES,
    MULTI_LABEL,
    REGRESSION,
    SGD_NAMES,
    SINGLE_LABEL,
    CheckpointConfig,
    Config,
)
from ftexp.config.timm_names import optimizer_names, without_drop_path
from ftexp.registry import FROM_PLUGINS, did_you_mean

_SECOND_ORDER = ("adahessian",)  # second-order optimisers of timm
# used where a recipe's values don't fit: warm-up as a share of train.epochs, min_lr as a share of optim.lr
_WARMUP_SHARE, _MIN_LR_SHARE = 0.1, 0.01
_CLIPPING = ("clip_grad_norm", "clip_grad_value", "clip_grad_agc")
# for optimisers with these name parts, timm scales the learning rate by the square root of the batch size
_ADAPTIVE = ("ada", "lamb")
_SCHEDULED_BY = {
    "cooldown_epochs": ("cosine", "poly", "tanh"),
    "min_lr": ("cosine", "poly", "tanh"),
    "decay_epochs": ("step",),
    "decay_rate": ("step", "poly"),
}
_PARAMETERS_OF_LOSSES = {
    "bce": ("target_threshold", "sum_classes", "pos_weight"),
    "focal": ("gamma",),
    "asl": ("gamma_pos", "gamma_neg"),
    "poly": ("epsilon",),
    "huber": ("delta",),
    "jsd": ("alpha",),
}
_OF_SEVERAL_LABELS = {"asl": ("clip", "pos_weight")}  # additional parameters with data.task=multi_label
_UNMIXED_LOSSES = ("focal", "asl")  # losses that need class numbers as targets, so no mixed samples
_FIELDS = {"opt": "name", **{name: name for name in ("lr", "weight_decay", "filter_bias_and_bn", "layer_decay")}}


def check_optim(config: Config) -> Iterator[str]:
    """Check the optimiser's name and arguments, and gradient clipping."""
    optim = config.optim
    if optim.name not in optimizer_names() and not config.plugins:
        suggestion = did_you_mean(optim.name, optimizer_names())
        yield f"optim.name='{optim.name}' is unknown.{suggestion} Any timm optimiser can be used. {FROM_PLUGINS}"
    if optim.name in _SECOND_ORDER:
        yield (
            f"optim.name={optim.name} needs second derivatives, which the training step does not compute: choose "
            "another"
        )
    for key, name in _FIELDS.items():
        if key in optim.kwargs:
            yield f"optim.kwargs.{key} conflicts with optim.{name}; set only optim.{name}"
    if (
        optim.kwargs.get("fused")
        and optim.name in SGD_NAMES
        and (config.train.freeze or config.train.precision == "fp16")
    ):
        yield (
            f"optim.kwargs.fused={optim.kwargs['fused']}: torch's fused SGD does not support train.freeze or "
            "train.precision=fp16, since all momenta must start at the first step: remove it"
        )
    given = [f"train.{name}={getattr(config.train, name)}" for name in _CLIPPING if getattr(config.train, name)]
    if len(given) > 1:
        yield f"{' and '.join(given)}: gradients are clipped in only one way: set only one of them"


def check_lr_base(config: Config) -> Iterator[str]:
    """Check optim.lr_base and whether optim.lr conflicts with it."""
    optim = config.optim
    if optim.lr_base is None:
        yield from unused(optim, "optim", ("lr_base_size", "lr_base_scale"), "needs optim.lr_base")
    elif not math.isclose(optim.lr, scaled_lr(config)):
        both = f"optim.lr={optim.lr} conflicts with optim.lr_base={optim.lr_base}"
        yield f"{both}, which gives {scaled_lr(config):g} here: set only one of them"


def scaled_lr(config: Config) -> float:
    """Return optim.lr_base scaled to the global batch, as in timm's train.py."""
    optim = config.optim
    assert optim.lr_base is not None
    share = config.train.global_batch_size / optim.lr_base_size
    by_root = any(part in optim.name.lower() for part in _ADAPTIVE)
    scale = optim.lr_base_scale or ("sqrt" if by_root else "linear")
    return optim.lr_base * (share**0.5 if scale == "sqrt" else share)


def check_batch_norm(config: Config) -> Iterator[str]:
    """Check how workers combine batch norm's statistics."""
    if config.train.eval == BESIDE:
        why = "needs train.eval=inline: train.eval=beside evaluates checkpoints, which hold rank 0's statistics"
        yield from unused(config.train, "train", ("dist_bn",), why)
    scaling = config.scaling
    has_gpus = scaling.use_gpu is True or (scaling.use_gpu == AUTO and num_local_gpus() > 0)
    if config.train.sync_bn and not has_gpus:
        yield "train.sync_bn=true: torch synchronises batch norm only on GPUs, and this run has none: remove it"


def check_loss(config: Config) -> Iterator[str]:
    """Check the loss, its parameters and class weights."""
    loss = config.loss
    if loss.name not in LOSSES and not config.plugins:
        yield unregistered("loss.name", loss.name, LOSSES)
    further = _OF_SEVERAL_LABELS.get(loss.name, ()) if config.data.task == MULTI_LABEL else ()
    for name, names in _PARAMETERS_OF_LOSSES.items():
        if name != loss.name:
            others = tuple(each for each in names if each not in further)
            yield from unused(loss, "loss", others, f"needs loss.name={name}")
    if "clip" not in further:
        yield from unused(loss, "loss", ("clip",), "needs loss.name=asl and data.task=multi_label")
    if loss.name in LOSSES:
        yield from unused(loss, "loss", ("kwargs",), "needs a loss from a plug-in")
    for name in ("gamma", "gamma_pos", "gamma_neg"):
        if 0 < getattr(loss, name) < 1:
            yield f"loss.{name}={getattr(loss, name)} must be 0 or at least 1: else gradients are infinite at p = 1"
    if loss.class_weights != "effective_num":
        yield from unused(loss, "loss", ("effective_num_beta",), "needs loss.class_weights=effective_num")
    yield from _weight_problems("loss.class_weights", loss.class_weights, CLASS_WEIGHTS, config.data.num_classes)
    if loss.pos_weight is not None:
        given = loss.pos_weight if isinstance(loss.pos_weight, list) else [loss.pos_weight]
        num_classes = config.data.num_classes if isinstance(loss.pos_weight, list) else None
        yield from _weight_problems("loss.pos_weight", given, (), num_classes)
    augment = config.augment
    if augment.mixes and loss.name in _UNMIXED_LOSSES and config.data.task == SINGLE_LABEL:
        mixing = " ".join(f"augment.{name}=0" for name in ("mixup_alpha", "cutmix_alpha") if getattr(augment, name))
        yield f"loss.name={loss.name} takes one class per sample, but samples are mixed: set {mixing}, or loss=poly"
    if loss.target_threshold is not None and not augment.mixes:
        needs = "needs augment.mixup_alpha or augment.cutmix_alpha above 0: without mixing, targets are already 0 or 1"
        yield f"loss.target_threshold={loss.target_threshold} {needs}"


def _weight_problems(key: str, given: Any, names: tuple[str, ...], num_classes: int | None) -> Iterator[str]:
    """Yield a message unless `given` is one of `names` or a list with one weight per class."""
    if isinstance(given, str) and given in names:
        return
    numbers = isinstance(given, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf for value in given
    )
    if not (numbers and any(given)):
        hint = did_you_mean(given, names) if isinstance(given, str) else ""
        options = f"{', '.join(names)}, or " if names else ""
        yield f"{key}={given} must be {options}a list with one weight per class, none below 0 and not all 0.{hint}"
    elif num_classes is not None and len(given) != num_classes:
        yield f"{key}={given} has {len(given)} weights, but data.num_classes={num_classes}: give one per class"


def fitted(config: Config, typed: Iterable[str]) -> tuple[Config, list[str]]:
    """Adapt recipe values that assume more epochs, a higher learning rate or another crop than `config` has.

    typed: overrides of this invocation. Values that they set don't change; `check_schedule`, `check_freeze` and
    `check_pictures` check them.

    Returns:
        The config, and a line for each changed value.
    """
    keys = typed_keys(typed)
    config, notes = _ranked_by_loss(_with_scaled_lr(config, keys), keys)
    config, shift_notes = _without_shift_if_cropped(config, keys)
    notes += shift_notes
    schedule, train = config.schedule, config.train
    if MISSING in (train.epochs, config.optim.lr) or train.epochs < 1 or config.optim.lr <= 0:
        return config, notes  # `validate` reports it
    if "schedule.warmup_epochs" not in keys and schedule.warmup_epochs >= train.epochs:
        warmup = train.epochs * _WARMUP_SHARE
        notes.append(
            f"schedule.warmup_epochs={warmup:g} instead of {schedule.warmup_epochs:g}: train.epochs={train.epochs}"
        )
        schedule = dataclasses.replace(schedule, warmup_epochs=warmup)
    if "schedule.min_lr" not in keys and schedule.min_lr > config.optim.lr:
        lowest = config.optim.lr * _MIN_LR_SHARE
        notes.append(f"schedule.min_lr={lowest:g} instead of {schedule.min_lr:g}: optim.lr={config.optim.lr:g}")
        schedule = dataclasses.replace(schedule, min_lr=lowest)
    for part, epoch in train.freeze.items():
        if (
            isinstance(epoch, int)
            and epoch >= train.epochs
            and keys.isdisjoint((f"train.freeze.{part}", "train.freeze"))
        ):
            notes.append(f"train.freeze.{part}=null instead of {epoch}: train.epochs={train.epochs}")
            train = dataclasses.replace(train, freeze={**train.freeze, part: None})
    return dataclasses.replace(config, schedule=schedule, train=train), notes


def _with_scaled_lr(config: Config, keys: set[str]) -> Config:
    """Set optim.lr from optim.lr_base unless an override sets optim.lr; `check_lr_base` then compares them."""
    optim = config.optim
    if optim.lr_base is None or "optim.lr" in keys or MISSING in (optim.name, config.train.global_batch_size):
        return config
    return dataclasses.replace(config, optim=dataclasses.replace(optim, lr=scaled_lr(config)))


def _ranked_by_loss(config: Config, keys: set[str]) -> tuple[Config, list[str]]:
    """Rank checkpoints by val_loss in a regression, which has no accuracy, unless an override sets the metric."""
    saving, names = config.checkpoint, ("checkpoint_score_attribute", "checkpoint_score_order")
    usual = CheckpointConfig()
    if config.data.task != REGRESSION or not keys.isdisjoint(f"checkpoint.{name}" for name in names):
        return config, []
    if any(getattr(saving, name) != getattr(usual, name) for name in names):  # set by a group file
        return config, []
    saving = dataclasses.replace(saving, checkpoint_score_attribute="val_loss", checkpoint_score_order="min")
    note = f"checkpoint.checkpoint_score_attribute=val_loss instead of val_accuracy: data.task={REGRESSION}"
    return dataclasses.replace(config, checkpoint=saving), [note]


def _without_shift_if_cropped(config: Config, keys: set[str]) -> tuple[Config, list[str]]:
    """Remove a group file's shift (augment.pad_px) if augment.crop is set; an override of it stays."""
    augment = config.augment
    if augment.crop == "none" or not augment.pad_px or "augment.pad_px" in keys:
        return config, []
    note = f"augment.pad_px=0 instead of {augment.pad_px}: augment.crop={augment.crop}"
    return dataclasses.replace(config, augment=dataclasses.replace(augment, pad_px=0)), [note]


def check_schedule(config: Config) -> Iterator[str]:
    """Check warm-up, cool-down and learning rates."""
    schedule, epochs = config.schedule, config.train.epochs
    if schedule.warmup_epochs and schedule.warmup_epochs >= epochs:
        yield f"schedule.warmup_epochs={schedule.warmup_epochs} must be below train.epochs={epochs}: lower it"
    if schedule.cooldown_epochs and schedule.warmup_epochs + schedule.cooldown_epochs >= epochs:
        yield (
            f"schedule.cooldown_epochs={schedule.cooldown_epochs} and schedule.warmup_epochs={schedule.warmup_epochs} "
            f"must be below train.epochs={epochs} together: lower one"
        )
    elif schedule.cooldown_epochs and schedule.name in _SCHEDULED_BY["cooldown_epochs"] and not schedule.min_lr:
        yield (
            f"schedule.cooldown_epochs={schedule.cooldown_epochs} with schedule.min_lr=0: the learning rate would be "
            "0 in these epochs; set schedule.min_lr, or remove schedule.cooldown_epochs"
        )
    if schedule.min_lr > config.optim.lr:
        yield f"schedule.min_lr={schedule.min_lr} must not be above optim.lr={config.optim.lr}"
    for name, users in _SCHEDULED_BY.items():
        if schedule.name not in users:
            yield from unused(schedule, "schedule", (name,), f"needs schedule={' or '.join(users)}")


def check_average(config: Config) -> Iterator[str]:
    """Check the EMA of the weights."""
    ema, names = config.ema, config.checkpoint.extra_state
    if ema.decay is None:
        others = tuple(field.name for field in dataclasses.fields(ema) if field.name != "decay")
        yield from unused(ema, "ema", others, "needs ema.decay")
        for key, metric in (
            ("checkpoint.checkpoint_score_attribute", config.checkpoint.checkpoint_score_attribute),
            ("sweep.metric", config.sweep.metric or ""),
        ):
            if metric.endswith("_ema"):
                yield f"{key}={metric} is a metric of the EMA: set ema.decay"
        return
    if "ema" not in names:
        yield f"checkpoint.extra_state={names} must hold ema, since ema.decay={ema.decay} keeps an EMA of the weights"
    if not ema.use_warmup:
        yield from unused(ema, "ema", ("warmup_gamma", "warmup_power"), "needs ema.use_warmup=true")


def check_drop_path(config: Config) -> Iterator[str]:
    """Check stochastic depth."""
    model = config.model
    if model.drop_path_rate is None:
        return
    if "drop_path_rate" in model.kwargs:
        yield "model.kwargs.drop_path_rate conflicts with model.drop_path_rate; set only model.drop_path_rate"
    if model.name.partition(".")[0] in without_drop_path():
        given = f"model.drop_path_rate={model.drop_path_rate}"
        yield f"{given}: model.name={model.name} has no stochastic depth; remove it"


def check_freeze(config: Config) -> Iterator[str]:
    """Check the syntax and epochs of train.freeze. Whether the model has the parts is checked when it is built."""
    for part, epoch in config.train.freeze.items():
        key = f"train.freeze.{part}={'null' if epoch is None else epoch}"
        if not str(part).strip():
            yield f"{key} names no part: write backbone, layers.0-5, or a pattern of parameter names"
        if epoch is None:
            continue
        if isinstance(epoch, dict):
            meant = ", ".join(f"{name}: {value}" for name, value in flat(epoch, f"{part}."))
            yield f"{key} is not an epoch; a part with dots in its name needs braces: 'train.freeze={{{meant}}}'"
            continue
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 1:
            yield f"{key} must be the first epoch that trains this part, a whole number from 1, or null for none"
        elif epoch >= config.train.epochs:
            yield (
                f"{key} is after the last epoch, {config.train.epochs - 1} (train.epochs={config.train.epochs}): "
                f"lower it, or set null to never train this part"
            )
