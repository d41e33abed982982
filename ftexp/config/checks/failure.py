"""Checks of failure budgets and of injected faults."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.wording import unknown
from ftexp.config.recovery import obstacles
from ftexp.config.schema import CAUSES, FAULTS, REPLACE, Config, fault_fields
from ftexp.registry import did_you_mean

_FAULT_FIELDS = ("kind", "step", "rank", "count", "seconds")


def check_failure(config: Config) -> Iterator[str]:
    """Check failure budgets, back-off, and settings that conflict with recovery."""
    failure = config.failure
    for cause, count in failure.max_by_cause.items():
        if cause not in CAUSES:
            yield unknown("failure.max_by_cause", cause, frozenset(CAUSES), f"Available: {', '.join(CAUSES)}")
        if count < 0:
            yield f"failure.max_by_cause.{cause}={count} must be at least 0; for no limit, remove it"
    if failure.repeat_step_every is not None and not config.train.deterministic:
        yield (
            f"failure.repeat_step_every={failure.repeat_step_every} compares bitwise, but with "
            "train.deterministic=false GPUs may round differently each time: set train.deterministic=true, or remove it"
        )
    if failure.memory_every_steps and not failure.takes_snapshots:
        yield (
            f"failure.memory_every_steps={failure.memory_every_steps} conflicts with failure.on_nonfinite=rollback, "
            "which restores the last checkpoint: remove it, or set failure.on_nonfinite=skip_step"
        )
    if failure.recovery == REPLACE:
        yield from (
            f"failure.recovery=replace conflicts with {each}, or set failure.recovery=auto"
            for each in obstacles(config)
        )
    if failure.backoff_s > failure.max_backoff_s:
        yield f"failure.backoff_s={failure.backoff_s} must not be above failure.max_backoff_s={failure.max_backoff_s}"


def check_chaos(config: Config) -> Iterator[str]:
    """Check the faults and their fields."""
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
            yield unknown(key, str(kind), known, f"Available: {', '.join(FAULTS)}")
        for name in sorted(set(fields) - set(_FAULT_FIELDS)):
            yield f"{key}.{name} is not a key.{did_you_mean(name, _FAULT_FIELDS)} Keys: {', '.join(_FAULT_FIELDS)}"
        for name, low in (("step", 1), ("rank", 0), ("count", 1), ("seconds", 0)):
            value = fields.get(name, low)
            whole = isinstance(value, int) or (name == "seconds" and isinstance(value, float))
            if isinstance(value, bool) or not whole or value < low:
                yield f"{key}.{name}={value!r} must be a number, at least {low}"
    for kind in chaos.kinds:
        if kind not in known:
            yield unknown("chaos.kinds", kind, known, f"Available: {', '.join(FAULTS)}")
    if chaos.step is not None and chaos.kind in ("none", "random"):
        yield f"chaos.step={chaos.step} is not used by chaos={chaos.kind}: remove it, or choose a fault"
    if chaos.kind == "random":
        if not chaos.kinds:
            yield "chaos.kinds=[] leaves chaos=random no fault to choose: name at least one"
        if chaos.faults:
            yield "chaos.faults conflicts with chaos.kind=random, which draws its own faults: set only one"
