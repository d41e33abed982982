"""Planned faults, computed from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftexp.config.schema import ChaosConfig, fault_fields
from ftexp.data.order import derive_seed, uniforms


@dataclass(frozen=True)
class Fault:
    """A fault that happens after `step`."""

    name: str  # unique in the run
    kind: str
    step: int
    rank: int
    count: int
    seconds: float


def planned_faults(config: ChaosConfig, total_steps: int) -> list[Fault]:
    """Return all faults of a run, in order of steps: a pure function, the same on every rank and in every attempt."""
    if config.kind == "random":
        return _random_faults(config, total_steps)
    listed = [fault_fields(fault) for fault in config.faults]
    if config.kind != "none":
        listed.insert(0, {"kind": config.kind, "step": config.step})
    faults = []
    for number, fault in enumerate(listed):
        # faults without a step are spread evenly
        step = fault.get("step") or max(1, total_steps * (number + 1) // (len(listed) + 1))
        own = {name: fault.get(name, getattr(config, name)) for name in ("rank", "count", "seconds")}
        faults.append(Fault(f"{number:02d}-{fault['kind']}", fault["kind"], step, **own))
    return sorted(faults, key=lambda fault: fault.step)


def _random_faults(config: ChaosConfig, total_steps: int) -> list[Fault]:
    seed, steps = derive_seed(config.seed), np.arange(1, total_steps)
    struck = steps[uniforms(seed, steps, 0) < config.rate]
    kinds = [config.kinds[int(draw * len(config.kinds))] for draw in uniforms(seed, struck, 1)]
    ranks = [int(draw * 2**20) for draw in uniforms(seed, struck, 2)]  # taken modulo the number of workers
    return [
        Fault(f"step{step:08d}-{kind}", kind, step, rank, config.count, config.seconds)
        for step, kind, rank in zip(struck.tolist(), kinds, ranks, strict=True)
    ]
