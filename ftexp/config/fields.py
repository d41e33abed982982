"""Schema fields with ranges and choices in their metadata, and checks of values against type and metadata."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import MISSING

from ftexp.registry import did_you_mean

_MAX_SHOWN = 60  # characters of a value that a message shows
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def ranged(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """Return a number field with the given bounds: low <= value <= high, and value > above. None is always allowed."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "above": above})


def choice(default: Any, options: tuple[str, ...]) -> Any:
    """Return a field whose value must be one of `options`."""
    return dataclasses.field(default=default, metadata={"options": options})


def typed_keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys that overrides set or delete."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def type_problems(key: str, value: Any, hint: Any) -> Iterator[str]:
    """Yield a message for each part of `value` that doesn't match `hint`, a field's annotation.

    OmegaConf converts single values, but accepts an interpolation in place of a mapping or list. Containers are checked
    recursively.
    """
    if isinstance(hint, types.UnionType):  # includes None
        if value is None:
            return
        (hint,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    if hint is Any:
        return
    container = typing.get_origin(hint)
    if value is None:
        yield null_problem(key)
    elif container is None:
        if not isinstance(value, (int, float) if hint is float else hint):
            yield f"{key}={shown(value)} is not {_NAMES[hint]}"
    elif not isinstance(value, container):
        yield keys_problem(key, value) if container is dict else list_problem(key, value)
    else:
        named = value.items() if container is dict else enumerate(value)
        for name, part in named:
            part_key = f"{key}.{name}" if container is dict else f"{key}[{name}]"
            yield from type_problems(part_key, part, typing.get_args(hint)[-1])


def null_problem(key: str) -> str:
    """Return the message for null where a value is required."""
    return f"{key}=null is not allowed: it must have a value"


def keys_problem(key: str, value: Any) -> str:
    """Return the message for a value that should be a mapping."""
    return f"{key}={shown(value)} is not allowed: {key} holds keys, so write {key}.<key>=..."


def list_problem(key: str, value: Any) -> str:
    """Return the message for a value that should be a list."""
    single = "..." if isinstance(value, dict) else shown(value)
    return f"{key}={shown(value)} must be a list: {key}=[{single}]"


def shown(value: Any) -> str:
    """Return a value as text for a message: on one line, truncated if long."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def field_problems(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for each field that is missing or out of range."""
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
    """Yield a message if the value violates its field's metadata (see `ranged` and `choice`)."""
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
