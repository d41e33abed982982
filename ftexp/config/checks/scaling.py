"""Checks of workers, their resources and the global batch that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ftexp.config.checks.wording import yaml_text
from ftexp.config.machine import num_local_gpus
from ftexp.config.schema import AUTO, Config, ScalingConfig


def check_scaling(config: Config) -> Iterator[str]:
    """Check workers, GPUs, resources and the backend."""
    scaling = config.scaling
    workers = scaling.num_workers
    pair = is_pair(workers)
    if pair and workers[0] > workers[1]:
        yield f"scaling.num_workers={list(workers)}: the first (min) must not be above the second (max)"
    elif not pair and not is_count(workers) and workers != AUTO:
        yield f"scaling.num_workers={yaml_text(workers)} must be a whole number from 1, [min, max], or auto"
    elif workers == AUTO and scaling.address is not None:
        yield "scaling.num_workers=auto counts only this machine: with scaling.address, give a number"
    if not isinstance(scaling.use_gpu, bool) and scaling.use_gpu != AUTO:  # 1 == True, but is not read as true
        yield f"scaling.use_gpu={yaml_text(scaling.use_gpu)} must be true, false or auto"
    elif scaling.use_gpu == AUTO and scaling.address is not None:
        yield "scaling.use_gpu=auto looks only at this machine: with scaling.address, set true or false"
    elif scaling.use_gpu is True and scaling.address is None:
        found = num_local_gpus()
        each = scaling.resources_per_worker.get("GPU", 1)
        needed = each * (max(workers) if pair else workers if is_count(workers) else 1)
        if found == 0:
            yield "scaling.use_gpu=true, but this machine has no GPU: set scaling=local or scaling.use_gpu=false"
        elif needed > found:
            yield (
                f"scaling.num_workers={workers} wants {each:g} GPU each, but this machine has {found}: use fewer "
                "workers, or let them share GPUs with scaling.resources_per_worker={GPU: 0.5} scaling.backend=gloo"
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
        yield f"scaling.resources_per_worker.GPU={share}: NCCL needs a whole GPU per worker; set scaling.backend=gloo"
    elif scaling.backend == "nccl" and scaling.use_gpu is False:
        yield "scaling.backend=nccl needs GPUs, but scaling.use_gpu=false: use gloo"


def _label_selector(scaling: ScalingConfig) -> Iterator[str]:
    selector, workers = scaling.label_selector, scaling.num_workers
    given = f"scaling.label_selector={yaml_text(selector)}"
    each = selector if isinstance(selector, list) else [{} if selector is None else selector]
    if not all(isinstance(labels, dict) and all(isinstance(text, str) for text in labels.values()) for labels in each):
        yield f"{given} must be {{label: text}}, or a list with one per worker"
    elif isinstance(selector, list) and (largest := max_workers(workers)) not in (None, len(selector)):
        yield f"{given} has {len(selector)} entries for scaling.num_workers={workers}: give {largest}, one per worker"


def is_count(value: object) -> bool:
    """Return whether `workers` is a number of workers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_pair(workers: object) -> bool:
    """Return whether `workers` is [min_workers, max_workers]."""
    return isinstance(workers, (list, tuple)) and len(workers) == 2 and all(is_count(count) for count in workers)


def max_workers(workers: Any) -> int | None:
    """Return the maximum number of workers; None if it isn't known yet or `workers` is invalid."""
    return max(workers) if is_pair(workers) else workers if is_count(workers) else None


def check_batch(config: Config) -> Iterator[str]:
    """Check that every micro-batch of every worker has at least one sample."""
    train, workers = config.train, config.scaling.num_workers
    largest = max_workers(workers) or 1
    if train.global_batch_size < largest * train.accumulate_steps:
        yield (
            f"train.global_batch_size={train.global_batch_size} is smaller than scaling.num_workers x "
            f"train.accumulate_steps = {largest} x {train.accumulate_steps}: each micro-batch needs a sample"
        )
