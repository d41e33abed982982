"""Text as files can hold it, and as there is room for it."""

from __future__ import annotations

from typing import Any


def plain(value: object) -> str:
    """Return the text of a value, as UTF-8 can hold it: JSON may have brought half a surrogate pair."""
    return str(value).encode("utf-8", "replace").decode()


def cut(value: object, max_length: int) -> str:
    """Return one line of at most so many characters."""
    line = " ".join(plain(value).split())
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def decimals(value: Any) -> str:
    """Return a number to four decimals; nothing for what is none."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""


def digits(value: Any) -> str:
    """Return a number of any size to four digits; nothing for what is none."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
