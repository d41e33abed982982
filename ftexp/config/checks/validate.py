"""What a config's types can't say: ranges, choices, names, and contradictions between groups.

`validate` runs before torch or Ray is imported and reports every mistake it finds, one line each: the key,
the value, what is allowed, the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ftexp.config.checks.checkpoint import check_checkpoint, check_sweep
from ftexp.config.checks.recipe import (
    check_augment,
    check_average,
    check_drop_path,
    check_freeze,
    check_optim,
    check_schedule,
)
from ftexp.config.checks.trackers import tracker_problems
from ftexp.config.field_checks import field_problems
from ftexp.config.machine import check_compiler
from ftexp.config.schema import AUTO, CAUSES, FAULTS, Config, ScalingConfig, config_dir, fault_fields
from ftexp.config.source_names import SOURCE_FIELDS, can_stream
from ftexp.config.timm_names import model_names
from ftexp.errors import ConfigError
from ftexp.registry import did_you_mean
from ftexp.storage.directory import is_remote

_FAULT_FIELDS = ("kind", "step", "rank", "count", "seconds")
_NO_LOGITS = {"features_only": "a list of feature maps", "aux_logits": "a tuple while it trains"}
_SOURCE_ONLY = frozenset(name for names in SOURCE_FIELDS.values() for name in names) | {"kwargs"}


def validate(config: Config, trains: bool = True) -> None:
    """Raise ConfigError, listing every mistake in `config`; of model, data and scaling alone if nothing `trains`."""
    wrong = dict(field_problems(config, ""))
    problems = list(wrong.values())
    # a check is left out if a field that it counts with is wrong by itself
    for check, fields in _CHECKS.items():
        if (trains or check in (_model, _data, _scaling)) and wrong.keys().isdisjoint(fields):
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


def _as_typed(value: object) -> str:
    """A value as it is written in YAML: null, true and 'text'."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )


def _unknown(key: str, value: str, known: frozenset[str], where: str) -> str:
    return f"{key}='{value}' is unknown.{did_you_mean(value, known)} {where}"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    architecture = model.name.partition(".")[0]  # timm names read architecture.pretrained_tag
    # a plug-in may register models with timm; timm's own message comes later then
    if not config.plugins and ":" not in model.name and architecture not in model_names():
        groups = [file.stem for file in (config_dir() / "model").glob("*.yaml")]
        near_group = get_close_matches(model.name, groups, n=1, cutoff=0.85)
        where = f"timm knows {len(model_names())} architectures; the groups under model= name the usual ones"
        if near_group:
            yield f"model.name='{model.name}' is unknown. Did you mean the group, model={near_group[0]}? {where}"
        else:
            yield _unknown("model.name", model.name, model_names(), where)
    for key, owner in (
        ("num_classes", "data.num_classes"),
        ("in_chans", "data.channels"),
        ("img_size", "data.image_size"),
    ):
        if key in model.kwargs:
            yield f"model.kwargs.{key}={model.kwargs[key]} follows the data: set {owner} instead"
    for key, owner in (
        ("model_name", "model.name"),
        ("pretrained", "model.pretrained"),
        ("checkpoint_path", "model.pretrained"),
    ):
        if key in model.kwargs:
            yield f"model.kwargs.{key}={model.kwargs[key]} stands beside {owner}: set that one"
    for key, output in _NO_LOGITS.items():
        if model.all_kwargs().get(key) and not config.plugins:  # a plug-in's model may mean something else by it
            given = f"model.kwargs.{key}={model.all_kwargs()[key]}"
            yield f"{given}: the model then returns {output}, not logits: take it out"
    in_name = re.search(r"patch(\d+)", model.name)
    patch = model.all_kwargs().get("patch_size", int(in_name[1]) if in_name else None)
    if isinstance(patch, int) and patch > 0 and config.data.image_size % patch:
        sizes = [size for size in (1, 2, 4, 7, 8, 14, 16, 32) if config.data.image_size % size == 0]
        yield (
            f"data.image_size={config.data.image_size} is not divisible by the patch size {patch} of "
            f"model.name={model.name}: set model.kwargs.patch_size to one of {sizes}, or another data.image_size"
        )
    if isinstance(model.pretrained, str):
        path = Path(model.pretrained).expanduser()
        if not path.is_file():
            found = "a directory" if path.is_dir() else "no such file"
            yield f"model.pretrained={model.pretrained}: {found}. Give a file of PyTorch's or safetensors', or true"
    elif not isinstance(model.pretrained, bool):
        yield f"model.pretrained={_as_typed(model.pretrained)} must be true, false, or the path of a weights file"


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
        if data.feed == "streaming" and not can_stream(data.name):
            yield f"data.feed=streaming: data.name={data.name} is in memory as a whole; take data.feed=cached"
        if "root" in used and data.root is None:
            yield f"data.root is not set: data.name={data.name} reads files, so say where they are"
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) != data.channels:
            found = f"{len(values)} value{'s' if len(values) != 1 else ''}"
            yield f"data.{name}={values} has {found}, but data.channels={data.channels}: give one a channel"
    if not all(math.isfinite(value) for value in data.mean):
        yield f"data.mean={data.mean} must be finite numbers: pixels are shifted by them"
    if not all(0 < value < math.inf for value in data.std):
        yield f"data.std={data.std} must be above 0 and finite throughout: pixels are divided by it"
    if data.val_fraction + data.test_fraction >= 1:
        yield (
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave nothing to "
            "train on: their sum must be below 1"
        )
    if config.augment.pad_px >= data.image_size:
        yield f"augment.pad_px={config.augment.pad_px} must be below data.image_size={data.image_size}"


def _scaling(config: Config) -> Iterator[str]:
    scaling = config.scaling
    workers = scaling.num_workers
    pair = _is_pair(workers)
    if pair and workers[0] > workers[1]:
        yield f"scaling.num_workers={list(workers)}: the first (fewest) must not be above the second (most)"
    elif not pair and not _is_count(workers) and workers != AUTO:
        yield f"scaling.num_workers={_as_typed(workers)} must be a whole number from 1, [fewest, most], or auto"
    elif workers == AUTO and scaling.address is not None:
        yield "scaling.num_workers=auto counts this machine only: with scaling.address set, give a number"
    if not isinstance(scaling.use_gpu, bool) and scaling.use_gpu != AUTO:  # 1 == True, but is not read as true
        yield f"scaling.use_gpu={_as_typed(scaling.use_gpu)} must be true, false or auto"
    elif scaling.use_gpu == AUTO and scaling.address is not None:
        yield "scaling.use_gpu=auto looks at this machine only: with scaling.address set, give true or false"
    elif scaling.use_gpu is True and scaling.address is None:
        found = num_local_gpus()
        each = scaling.resources_per_worker.get("GPU", 1)
        needed = each * (max(workers) if pair else workers if _is_count(workers) else 1)
        if found == 0:
            yield "scaling.use_gpu=true, but this machine has no GPU: use scaling=local, or scaling.use_gpu=false"
        elif needed > found:
            yield (
                f"scaling.num_workers={workers} wants {each:g} GPU each, but this machine has {found}: take fewer, or "
                "let them share with scaling.resources_per_worker={GPU: 0.5} scaling.backend=gloo"
            )
    for name, amount in scaling.resources_per_worker.items():
        if not 0 <= amount < math.inf:
            yield f"scaling.resources_per_worker.{name}={amount} must be a number from 0"
    if scaling.address is not None and scaling.address.startswith("ray://"):
        yield (
            f"scaling.address={scaling.address}: Ray Client is not supported, since workers must reach the driver. "
            "Run on a node of the cluster with scaling.address=auto (ray job submit does that)"
        )
    yield from _label_selector(scaling)
    if scaling.backend not in (None, "gloo", "nccl"):
        yield f"scaling.backend={scaling.backend!r} must be gloo, nccl or null"
    elif scaling.backend != "gloo" and 0 < scaling.resources_per_worker.get("GPU", 1) < 1 and workers != 1:
        share = scaling.resources_per_worker["GPU"]
        yield f"scaling.resources_per_worker.GPU={share}: NCCL wants a GPU for each worker; set scaling.backend=gloo"
    elif scaling.backend == "nccl" and scaling.use_gpu is False:
        yield "scaling.backend=nccl needs GPUs, but scaling.use_gpu=false: use gloo"


def _label_selector(scaling: ScalingConfig) -> Iterator[str]:
    selector, workers = scaling.label_selector, scaling.num_workers
    given = f"scaling.label_selector={_as_typed(selector)}"
    each = selector if isinstance(selector, list) else [{} if selector is None else selector]
    if not all(isinstance(labels, dict) and all(isinstance(text, str) for text in labels.values()) for labels in each):
        yield f"{given} must be {{label: text}}, or a list of such, one for each worker"
    elif isinstance(selector, list) and (most := _max_workers(workers)) not in (None, len(selector)):
        yield f"{given} has {len(selector)} entries for scaling.num_workers={workers}: give {most}, one for each worker"


def _failure(config: Config) -> Iterator[str]:
    failure = config.failure
    for cause, count in failure.max_by_cause.items():
        if cause not in CAUSES:
            yield _unknown("failure.max_by_cause", cause, frozenset(CAUSES), f"Available: {', '.join(CAUSES)}")
        if count < 0:
            yield f"failure.max_by_cause.{cause}={count} must be at least 0; without a limit, leave it out"
    if failure.backoff_s > failure.max_backoff_s:
        yield f"failure.backoff_s={failure.backoff_s} must not be above failure.max_backoff_s={failure.max_backoff_s}"


def _run(config: Config) -> Iterator[str]:
    name = config.run.name
    if name is not None and (not name.strip() or {".", ".."} & set(name.split("/")) or name.startswith("/")):
        yield f"run.name={name!r} can't name a folder under run.storage: give a name, or leave it out for a new run"

    if name is None and config.resume == "must":
        yield "resume=must needs run.name: without one, every call begins a new run"
    if is_remote(config.run.storage):
        for key, value in (("run.storage", config.run.storage), ("run.name", name), ("sweep.name", config.sweep.name)):
            if value is not None and (found := sorted(set(value) & set("#" if key == "run.storage" else "#%?"))):
                yield f"{key}={value} holds {' and '.join(found)}, which mean something else in a URI: leave them out"


def _chaos(config: Config) -> Iterator[str]:
    chaos = config.chaos
    known = frozenset(FAULTS)
    for number, fault in enumerate(chaos.faults):
        key = f"chaos.faults[{number}]"
        if not isinstance(fault, (str, dict)) or (isinstance(fault, dict) and "kind" not in fault):
            yield f"{key}={fault} must be a fault's name, or {{kind: ..., step: ..., rank: ...}}"
            continue
        fields = fault_fields(fault)
        kind = fields["kind"]
        if not isinstance(kind, str) or kind not in known:
            yield _unknown(key, str(kind), known, f"Available: {', '.join(FAULTS)}")
        for name in sorted(set(fields) - set(_FAULT_FIELDS)):
            yield f"{key}.{name} is not a key.{did_you_mean(name, _FAULT_FIELDS)} Keys: {', '.join(_FAULT_FIELDS)}"
        for name, low in (("step", 1), ("rank", 0), ("count", 1), ("seconds", 0)):
            value = fields.get(name, low)
            whole = isinstance(value, int) or (name == "seconds" and isinstance(value, float))
            if isinstance(value, bool) or not whole or value < low:
                yield f"{key}.{name}={value!r} must be a number, at least {low}"
    for kind in chaos.kinds:
        if kind not in known:
            yield _unknown("chaos.kinds", kind, known, f"Available: {', '.join(FAULTS)}")
    if chaos.step is not None and chaos.kind in ("none", "random"):
        yield f"chaos.step={chaos.step} is not used by chaos={chaos.kind}: take it out, or choose a fault"
    if chaos.kind == "random":
        if not chaos.kinds:
            yield "chaos.kinds=[] leaves chaos=random nothing to do: name some faults"
        if chaos.faults:
            yield "chaos.faults stands beside chaos.kind=random, which draws its own: take one of them"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pair(workers: object) -> bool:
    return isinstance(workers, (list, tuple)) and len(workers) == 2 and all(_is_count(count) for count in workers)


def _max_workers(workers: Any) -> int | None:
    """The largest number of workers; None where that isn't known yet, or `workers` is wrong."""
    return max(workers) if _is_pair(workers) else workers if _is_count(workers) else None


def _batch(config: Config) -> Iterator[str]:
    train, workers = config.train, config.scaling.num_workers
    most = _max_workers(workers) or 1
    if train.global_batch_size < most * train.accumulate_steps:
        yield (
            f"train.global_batch_size={train.global_batch_size} is smaller than scaling.num_workers x "
            f"train.accumulate_steps = {most} x {train.accumulate_steps}: each micro-batch needs a sample"
        )


# each check, and the fields that it counts with
_CHECKS: dict[Callable[[Config], Iterator[str]], tuple[str, ...]] = {
    _run: (),
    check_sweep: (),
    _model: ("model.name", "data.image_size"),
    _data: (
        *("data.name", "data.image_size", "data.channels", "data.mean", "data.std"),
        *("data.val_fraction", "data.test_fraction", "augment.pad_px"),
    ),
    check_augment: ("train.global_batch_size", "data.channels", "augment.mixup_alpha", "augment.cutmix_alpha"),
    check_optim: ("optim.name",),
    check_schedule: ("schedule.warmup_epochs", "schedule.min_lr", "train.epochs", "optim.lr"),
    check_average: (),
    check_drop_path: ("model.name",),
    check_freeze: ("train.epochs",),
    _scaling: (),
    check_compiler: (),
    _batch: ("train.global_batch_size", "train.accumulate_steps"),
    check_checkpoint: ("checkpoint.checkpoint_score_order",),
    _chaos: ("chaos.kind",),
    tracker_problems: (),
    _failure: ("failure.backoff_s", "failure.max_backoff_s"),
}
