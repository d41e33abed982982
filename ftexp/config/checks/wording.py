"""Message parts that several checks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ftexp.registry import FROM_PLUGINS, did_you_mean


def yaml_text(value: object) -> str:
    """Return a value in YAML syntax: null, true or 'text'."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )


def unknown(key: str, value: str, known: frozenset[str], where: str) -> str:
    """Return the message for a name that is not in `known`; it ends with `where`."""
    return f"{key}='{value}' is unknown.{did_you_mean(value, known)} {where}"


def unregistered(key: str, value: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not in `known`, with a hint that plug-ins can register others."""
    names = list(known)
    return unknown(key, value, frozenset(names), f"Available: {', '.join(names)}. {FROM_PLUGINS}")


def unused(node: Any, prefix: str, names: tuple[str, ...], needs: str) -> Iterator[str]:
    """Yield a message for each field in `names` that isn't at its default, since nothing reads it."""
    defaults = type(node)()
    for name in names:
        value = getattr(node, name)
        if value != getattr(defaults, name):
            yield f"{prefix}.{name}={value} {needs}: remove it, or set that too"
