"""The decision about a failure: a pure function of its cause, its step and the history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from ftexp.config.schema import REPLACE, FailureConfig
from ftexp.failure.causes import BUG, CRASH, NON_FINITE, OUT_OF_MEMORY, PREEMPTION, RAY, Cause, Ending

MIN_MICRO_BATCH = 2  # images: batch norm can't train on one


@dataclass(frozen=True)
class Past:
    """An earlier failure of the run."""

    cause: str
    step: int  # last step done before it
    error: str
    progressed: bool  # whether its attempt had done a step that no attempt had done before


class Action(Enum):
    """A reaction to a failure."""

    RESTART = auto()
    REPLACE = auto()  # only the failed worker
    RESTART_SMALLER_MICRO_BATCHES = auto()  # micro-batches of half the size
    STOP = auto()


@dataclass(frozen=True)
class Decision:
    """A reaction, and the arithmetic behind it."""

    action: Action
    reason: str
    cause: str  # cause for the history: BUG if an exception repeats at the same step
    delay_s: float = 0.0


def decide(
    cause: Cause,
    step: int,
    progressed: bool,
    past: Sequence[Past],
    config: FailureConfig,
    micro_batch: int,
    others_wait: bool = False,
) -> Decision:
    """Decide what to do about a failure.

    Args:
        cause: cause of the failure.
        step: last step done before it.
        progressed: whether the failed attempt had done a step that no attempt had done before.
        past: earlier failures that may be charged to the budgets, oldest first.
        config: the budgets and reactions.
        micro_batch: images in a worker's largest micro-batch.
        others_wait: whether all other workers can wait until the one that failed is replaced.
    """
    kind = cause.kind
    if cause.ending is Ending.GAVE_UP:
        return Decision(Action.STOP, "another attempt would fail the same way: stopping", kind)
    if kind == BUG:
        return Decision(Action.STOP, "a restart does not fix a bug: stopping", BUG)
    if (
        kind in (CRASH, NON_FINITE)
        and cause.ending is not Ending.DIED
        and past
        and (past[-1].step, past[-1].error) == (step, cause.error)
    ):
        found = BUG if kind == CRASH else kind
        return Decision(
            Action.STOP, "the same error occurred twice at the same step, so it is treated as a bug: stopping", found
        )
    if kind == OUT_OF_MEMORY and config.on_out_of_memory == "fail":
        advice = f"train.accumulate_steps makes micro-batches smaller than {micro_batch}, at the same global batch"
        return Decision(Action.STOP, f"failure.on_out_of_memory=fail: stopping; {advice}", kind)
    if config.on_out_of_memory == "halve_micro_batch":
        if kind == OUT_OF_MEMORY:
            return _halve(micro_batch)
        past = [failure for failure in past if failure.cause != OUT_OF_MEMORY]
    return _by_budgets(kind, step, progressed, past, config, others_wait and _can_replace(cause, config))


def _can_replace(cause: Cause, config: FailureConfig) -> bool:
    """Return whether the failed worker can be replaced alone: the others hold all of its state, unless it is rank 0."""
    dies_alone = cause.ending is Ending.DIED and cause.kind != PREEMPTION  # a preemption takes the slot too
    return config.recovery == REPLACE and dies_alone and bool(cause.rank)


def _halve(micro_batch: int) -> Decision:
    """Decide to restart with smaller micro-batches; charged to no budget, since the size has a minimum."""
    if micro_batch <= MIN_MICRO_BATCH:
        return Decision(Action.STOP, "micro-batches can't get smaller: stopping", OUT_OF_MEMORY)
    smaller = f"micro-batches of {math.ceil(micro_batch / 2)} images, not {micro_batch}, at the same global batch"
    reason = f"restarting the workers with {smaller}"
    return Decision(Action.RESTART_SMALLER_MICRO_BATCHES, reason, OUT_OF_MEMORY)


def _by_budgets(
    kind: str, step: int, progressed: bool, past: Sequence[Past], config: FailureConfig, replaces: bool
) -> Decision:
    refill = config.refill_after_steps
    recent = [failure for failure in past if refill is None or step - failure.step < refill]
    charged = [failure for failure in recent if failure.cause not in (PREEMPTION, RAY)]
    parts = []
    if kind == PREEMPTION:
        count, limit = sum(failure.cause == PREEMPTION for failure in past) + 1, config.max_preemption_failures
        parts.append(f"preemption {count}{_shown(limit)}, not charged to failure.max_failures")
    elif kind == RAY:
        count, limit = sum(failure.cause == RAY for failure in recent) + 1, config.max_ray_failures
        parts.append(f"new Ray {count}{_shown(limit)}, not charged to failure.max_failures")
    else:
        count, limit = len(charged) + 1, config.max_failures
        since = f" in the last {refill} steps" if refill is not None else ""
        parts.append(f"failure {count}{_shown(limit)}{since}")
    exceeded = 0 <= limit < count
    own_limit = config.max_by_cause.get(kind)
    if own_limit is not None:
        own_count = sum(failure.cause == kind for failure in recent) + 1
        parts.append(f"{kind} {own_count} of {own_limit} allowed")
        exceeded = exceeded or own_count > own_limit
    stuck = 0 if progressed else 1 + _num_stuck(past)
    max_stuck = config.max_failures_without_progress
    if stuck:
        allowed = "" if max_stuck < 0 else f" of {max_stuck} allowed"
        parts.append(f"{stuck}{allowed} in a row without a new step")
    exceeded = exceeded or 0 <= max_stuck < stuck
    arithmetic = ", ".join(parts)
    if exceeded:
        return Decision(Action.STOP, f"{arithmetic}: stopping", kind)
    if kind == RAY:  # no delay: starting Ray takes long enough
        return Decision(Action.RESTART, f"{arithmetic}: starting a new Ray", kind)
    delay_s = min(config.backoff_s * 2.0 ** min(stuck - 1, 99), config.max_backoff_s) if stuck else 0.0
    wait = f" in {delay_s:g} s" if delay_s else ""
    if replaces:
        return Decision(Action.REPLACE, f"{arithmetic}: replacing the worker{wait}", kind, delay_s)
    return Decision(Action.RESTART, f"{arithmetic}: restarting the workers{wait}", kind, delay_s)


def _num_stuck(past: Sequence[Past]) -> int:
    """Return the number of latest failures in a row without a new step."""
    return next((number for number, failure in enumerate(reversed(past)) if failure.progressed), len(past))


def _shown(limit: int) -> str:
    return " (no limit)" if limit < 0 else f" of {limit} allowed"
