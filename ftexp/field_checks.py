"""What a field's metadata asks of its value: see `ftexp.fields.ranged` and `ftexp.fields.choice`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from ftexp.registry import did_you_mean


def field_problems(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, message) of every field that is missing or out of its range."""
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from field_problems(value, f"{key}.")
        elif value == MISSING:
            yield key, f"{key} is not set, and has no default: add {key}=..."
        elif value is not None and field.metadata:
            for problem in range_problem(key, value, **field.metadata):
                yield key, problem


def range_problem(
    key: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    options: tuple[str, ...] = (),
) -> Iterator[str]:
    """The message for a value outside its field's metadata (see `ftexp.fields.ranged`), or nothing."""
    if options:
        if value not in options:
            yield f"{key}={value!r} is not one of {', '.join(options)}.{did_you_mean(str(value), options)}"
        return
    bounds = [
        text
        for bound, text in ((above, f"above {above}"), (low, f"at least {low}"), (high, f"at most {high}"))
        if bound is not None
    ]
    inside = (above is None or value > above) and (low is None or value >= low) and (high is None or value <= high)
    if math.isinf(value) and inside:
        yield f"{key}={value} is out of range: it must be finite"
    elif not inside:  # NaN is not inside anything
        yield f"{key}={value} is out of range: it must be {' and '.join(bounds)}"
