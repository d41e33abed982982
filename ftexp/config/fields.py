"""Fields of a schema that say more than their type; `ftexp.config.field_checks` holds values to it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def ranged(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A number field: low <= value <= high, and value > above, where given. None passes."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


def choice(default: Any, options: tuple[str, ...]) -> Any:
    """A field that holds one of `options`."""
    return field(default=default, metadata={"options": options})
