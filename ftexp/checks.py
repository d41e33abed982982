"""What a config's types can't say: ranges, choices, names, and contradictions between groups.

`validate` runs before torch or Ray is imported and reports every mistake it finds, one line each: the key,
the value, what is allowed, the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ftexp.config import AUTO, Config
from ftexp.data.names import SOURCE_FIELDS
from ftexp.errors import ConfigError
from ftexp.registry import did_you_mean
from ftexp.timm_names import model_names, optimizer_names

_SOURCE_ONLY = frozenset(name for names in SOURCE_FIELDS.values() for name in names) | {"kwargs"}


def validate(config: Config) -> None:
    """Raise ConfigError, listing every mistake in `config`; return None if there is none."""
    problems = list(_field_problems(config, ""))
    if not problems:  # the rest assumes that fields hold what their types say
        for check in (_model, _data, _optim, _schedule, _scaling, _batch, _checkpoint):
            problems += check(config)
    if problems:
        raise ConfigError("\n".join(problems))


def num_local_gpus() -> int:
    """NVIDIA GPUs that this machine offers, asked of its driver: torch isn't imported yet."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return 0
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return min(found, len(visible.split(","))) if visible else found


def _field_problems(node: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _field_problems(value, f"{key}.")
        elif value == MISSING:
            yield f"{key} is not set, and has no default: add {key}=..."
        elif value is not None and field.metadata:
            yield from range_problem(key, value, **field.metadata)


def range_problem(
    key: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    options: tuple[str, ...] = (),
) -> Iterator[str]:
    """The message for a value outside its field's metadata (see `ftexp.config.ranged`), or nothing."""
    if options:
        if value not in options:
            yield f"{key}={value!r} is not one of {', '.join(options)}.{did_you_mean(str(value), options)}"
        return
    bounds = [
        text
        for bound, text in ((above, f"above {above}"), (low, f"at least {low}"), (high, f"at most {high}"))
        if bound is not None
    ]
    inside = (
        (above is None or value > above) and (low is None or value >= low) and (high is None or value <= high)
    )  # also False for NaN
    if not inside:
        yield f"{key}={value} is out of range: it must be {' and '.join(bounds)}"


def _unknown(key: str, value: str, known: frozenset[str], where: str) -> str:
    return f"{key}='{value}' is unknown.{did_you_mean(value, known)} {where}"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    architecture = model.name.partition(".")[0]  # timm names read architecture.pretrained_tag
    # a plug-in may register models with timm; timm's own message comes later then
    if not config.plugins and ":" not in model.name and architecture not in model_names():
        where = f"timm knows {len(model_names())} architectures; the groups under model= name the usual ones"
        yield _unknown("model.name", model.name, model_names(), where)
    for key, owner in (
        ("num_classes", "data.num_classes"),
        ("in_chans", "data.channels"),
        ("img_size", "data.image_size"),
    ):
        if key in model.kwargs:
            yield f"model.kwargs.{key}={model.kwargs[key]} follows the data: set {owner} instead"
    in_name = re.search(r"patch(\d+)", model.name)
    patch = model.all_kwargs().get("patch_size", int(in_name[1]) if in_name else None)
    if isinstance(patch, int) and patch > 0 and config.data.image_size % patch:
        sizes = [size for size in (1, 2, 4, 7, 8, 14, 16, 32) if config.data.image_size % size == 0]
        yield (
            f"data.image_size={config.data.image_size} is not divisible by the patch size {patch} of "
            f"model.name={model.name}: set model.kwargs.patch_size to one of {sizes}, or another data.image_size"
        )
    if isinstance(model.pretrained, str):
        if not Path(model.pretrained).is_file():
            yield f"model.pretrained={model.pretrained}: no such file. Give a .pt, .pth or .safetensors file, or true"
        elif Path(model.pretrained).suffix not in (".pt", ".pth", ".safetensors"):
            yield f"model.pretrained={model.pretrained} must end in .pt, .pth or .safetensors"
    elif not isinstance(model.pretrained, bool):
        yield f"model.pretrained={model.pretrained!r} must be true, false, or the path of a weights file"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.name not in SOURCE_FIELDS:
        if not config.plugins:
            names = frozenset(SOURCE_FIELDS)
            yield _unknown("data.name", data.name, names, f"Available: {', '.join(sorted(names))}")
    else:
        used = SOURCE_FIELDS[data.name]
        defaults = {field.name: field for field in dataclasses.fields(data)}
        for name in sorted(_SOURCE_ONLY - set(used)):
            field, value = defaults[name], getattr(data, name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default:
                yield f"data.{name}={value} is not used by data.name={data.name}: take it out"
        if "root" in used and data.root is None:
            yield f"data.root is not set: data.name={data.name} reads files, so say where they are"
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) != data.channels:
            yield f"data.{name}={values} has {len(values)} values, but data.channels={data.channels}: give one a channel"
    if any(not value > 0 for value in data.std):
        yield f"data.std={data.std} must be above 0 throughout: pixels are divided by it"
    if data.val_fraction + data.test_fraction >= 1:
        yield (
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave nothing to "
            "train on: their sum must be below 1"
        )
    if config.augment.pad_px >= data.image_size:
        yield f"augment.pad_px={config.augment.pad_px} must be below data.image_size={data.image_size}"


def _optim(config: Config) -> Iterator[str]:
    if config.optim.name not in optimizer_names() and not config.plugins:
        yield _unknown("optim.name", config.optim.name, optimizer_names(), "Any optimiser of timm's can be named")
    for key in ("opt", "lr", "weight_decay"):
        if key in config.optim.kwargs:
            yield f"optim.kwargs.{key} stands beside optim.{'name' if key == 'opt' else key}: set that one"


def _schedule(config: Config) -> Iterator[str]:
    schedule, epochs = config.schedule, config.train.epochs
    if schedule.warmup_epochs and schedule.warmup_epochs >= epochs:
        yield f"schedule.warmup_epochs={schedule.warmup_epochs} must be below train.epochs={epochs}"
    if schedule.min_lr > config.optim.lr:
        yield f"schedule.min_lr={schedule.min_lr} must not be above optim.lr={config.optim.lr}"


def _scaling(config: Config) -> Iterator[str]:
    scaling = config.scaling
    workers = scaling.num_workers
    pair = isinstance(workers, (list, tuple)) and len(workers) == 2 and all(_is_count(count) for count in workers)
    if pair and workers[0] > workers[1]:
        yield f"scaling.num_workers={list(workers)}: the first (fewest) must not be above the second (most)"
    elif not pair and not _is_count(workers) and workers != AUTO:
        yield f"scaling.num_workers={workers!r} must be a whole number from 1, [fewest, most], or auto"
    elif workers == AUTO and scaling.address is not None:
        yield "scaling.num_workers=auto counts this machine only: with scaling.address set, give a number"
    if scaling.use_gpu not in (True, False, AUTO):
        yield f"scaling.use_gpu={scaling.use_gpu!r} must be true, false or auto"
    elif scaling.use_gpu is True and scaling.address is None:
        found = num_local_gpus()
        needed = max(workers) if pair else workers if _is_count(workers) else 1
        if found == 0:
            yield "scaling.use_gpu=true, but this machine has no GPU: use scaling=local, or scaling.use_gpu=false"
        elif needed > found:
            yield f"scaling.num_workers={workers} wants a GPU each, but this machine has {found}"
    if scaling.address is not None and scaling.address.startswith("ray://"):
        yield (
            f"scaling.address={scaling.address}: Ray Client is not supported, since workers must reach the driver. "
            "Run on a node of the cluster with scaling.address=auto (ray job submit does that)"
        )
    if scaling.backend not in (None, "gloo", "nccl"):
        yield f"scaling.backend={scaling.backend!r} must be gloo, nccl or null"
    elif scaling.backend == "nccl" and scaling.use_gpu is False:
        yield "scaling.backend=nccl needs GPUs, but scaling.use_gpu=false: use gloo"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _batch(config: Config) -> Iterator[str]:
    train, workers = config.train, config.scaling.num_workers
    most = max(workers) if isinstance(workers, (list, tuple)) else workers if _is_count(workers) else 1
    if train.global_batch_size < most * train.accumulate_steps:
        yield (
            f"train.global_batch_size={train.global_batch_size} is smaller than scaling.num_workers x "
            f"train.accumulate_steps = {most} x {train.accumulate_steps}: each micro-batch needs a sample"
        )


def _checkpoint(config: Config) -> Iterator[str]:
    names = config.checkpoint.extra_state
    if "progress" not in names:
        yield f"checkpoint.extra_state={names} must hold progress: a run can't resume without its position"
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"checkpoint.extra_state names {name} more than once"
    if config.train.precision == "fp16" and "scaler" not in names:
        yield f"checkpoint.extra_state={names} must hold scaler, since train.precision=fp16 scales the loss"
