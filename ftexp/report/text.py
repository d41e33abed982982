"""Text that files can store, in limited length."""

from __future__ import annotations

from typing import Any


def plain(value: object) -> str:
    """Return the text of a value so that UTF-8 can encode it: JSON may contain half a surrogate pair."""
    return str(value).encode("utf-8", "replace").decode()


def cut(value: object, max_length: int) -> str:
    """Return one line of at most `max_length` characters."""
    line = " ".join(plain(value).split())
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def decimals(value: Any) -> str:
    """Return a number with four decimals; empty for anything else."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""


def digits(value: Any) -> str:
    """Return a number of any size with four significant digits; empty for anything else."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
