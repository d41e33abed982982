"""Checks of model sharding, compilation and activation checkpointing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from ftexp.config.checks.scaling import is_count, is_pair
from ftexp.config.checks.wording import unused, yaml_text
from ftexp.config.schema import COMPILED, DDP, FEATURES, HSDP, Config
from ftexp.config.timm_names import optimizer_names
from ftexp.registry import did_you_mean

# timm's optimisers whose updates are the same on shards: they work elementwise, or torch reduces their sums over
# shards. Measured by scripts/check_optimizers.py
SHARDED_OPTIMIZERS = frozenset(
    (
        *("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamc", "adamw", "adamwlegacy", "adan", "adanw"),
        *("adopt", "adoptc", "adoptw", "lamb", "lambc", "lambw", "laprop", "larc", "lars", "lion", "lionc", "madgrad"),
        *("madgradw", "momentum", "nadam", "nadamc", "nadamw", "nesterov", "nlarc", "nlars", "radam", "radamw"),
        *("rmsprop", "rmsproptf", "sgd", "sgdc"),
    )
)
_EVERY = re.compile(r"every_([2-9]|[1-9]\d+)")
_ACTIVATIONS = ("none", "blocks", "every_2")


def check_parallel(config: Config) -> Iterator[str]:
    """Check the group parallel and settings that need the whole model on each worker."""
    parallel = config.parallel
    if parallel.kind == DDP:
        others = tuple(field.name for field in dataclasses.fields(parallel) if field.name not in ("kind", "wrap"))
        yield from unused(parallel, "parallel", others, "needs parallel=fsdp or hsdp")
        if config.train.compiled != "blocks" and config.train.checkpoint_activations == "none":
            needs = "needs parallel=fsdp or hsdp, or train.compile=blocks, or train.checkpoint_activations"
            yield from unused(parallel, "parallel", ("wrap",), needs)
        return
    yield from _size_problems(config)
    yield from _whole_model_problems(config)
    if parallel.param_dtype == "fp16" and config.train.precision != "fp16":
        yield "parallel.param_dtype=fp16 needs a loss scale, which comes with train.precision=fp16: set that, or bf16"
    for number, pattern in enumerate(parallel.wrap):
        if not pattern.strip(". "):
            yield f"parallel.wrap[{number}]={pattern!r} names no module: give a pattern of names such as blocks.*"
    if config.optim.name not in SHARDED_OPTIMIZERS and config.optim.name in optimizer_names():
        near = did_you_mean(config.optim.name, SHARDED_OPTIMIZERS)
        yield f"optim.name={config.optim.name} updates shards differently from whole tensors: choose another.{near}"


def _size_problems(config: Config) -> Iterator[str]:
    """Yield a message if the number of workers doesn't fit the size of a replica."""
    parallel, workers = config.parallel, config.scaling.num_workers
    size = parallel.shard_size
    if parallel.kind != HSDP:
        yield from unused(parallel, "parallel", ("shard_size",), "needs parallel=hsdp")
    elif size is None:
        yield (
            "parallel=hsdp needs parallel.shard_size, the number of workers that share a replica, for example those "
            "of a node"
        )
    elif is_pair(workers) and workers[0] != workers[1]:
        yield (
            f"parallel=hsdp with scaling.num_workers={list(workers)}: every number of workers in the range must be a "
            f"multiple of parallel.shard_size={size}: give one number, or set parallel=fsdp"
        )
    elif is_count(workers) and workers % size:
        yield f"scaling.num_workers={workers} is not a multiple of parallel.shard_size={size}: change one of them"


def _whole_model_problems(config: Config) -> Iterator[str]:
    """Yield a message for each setting that needs the whole model, or a whole tensor, on one worker."""
    train, why = config.train, f"parallel={config.parallel.kind}"
    if train.clip_grad_agc is not None:
        yield (
            f"train.clip_grad_agc={train.clip_grad_agc} needs whole tensors, which no worker has under {why}: set "
            "train.clip_grad_norm instead"
        )
    if train.sync_bn:
        yield f"train.sync_bn=true is for parallel=ddp: remove it under {why}"
    if train.channels_last:
        yield f"train.channels_last=true: shards are contiguous rows; remove it under {why}"
    if config.failure.check_replicas_every_steps is not None:
        given = f"failure.check_replicas_every_steps={config.failure.check_replicas_every_steps}"
        yield f"{given} compares whole replicas, but under {why} each worker holds a part: remove it"
    if train.compiled == "model":
        yield f"train.compile={yaml_text(train.compile)}: {why} gathers one block at a time; set train.compile=blocks"
    if config.distill.teacher is not None and config.distill.kind == FEATURES:
        yield (
            f"distill.kind={FEATURES} calls parts of the model, but {why} gathers only the whole model: set "
            "distill=logits"
        )


def check_computing(config: Config) -> Iterator[str]:
    """Check train.compile and train.checkpoint_activations."""
    train = config.train
    if not isinstance(train.compile, bool) and train.compile not in COMPILED:
        near = did_you_mean(str(train.compile), COMPILED)
        yield f"train.compile={train.compile} is not one of {', '.join(COMPILED)}.{near}"
    given = train.checkpoint_activations
    if given not in _ACTIVATIONS and not _EVERY.fullmatch(given):
        near = did_you_mean(given, _ACTIVATIONS)
        yield f"train.checkpoint_activations={given} is not one of none, blocks, every_2, every_3, ...{near}"
