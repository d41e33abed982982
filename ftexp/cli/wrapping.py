"""Lines broken between words to the width of a terminal; a terminal breaks them anywhere."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from shutil import get_terminal_size


def wrapped(text: str, width: int, indent: int = 2) -> str:
    """Return `text` in lines of at most `width` characters; those that continue one are indented.

    A word that is longer than a line stays whole, so that paths can be copied.
    """
    pad = " " * min(indent, width // 2)
    return "\n".join(
        textwrap.fill(line, max(width, 1), subsequent_indent=pad, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def print_wrapped(lines: Iterable[str]) -> None:
    """Print `lines` to standard error, wrapped if it is a terminal."""
    for line in lines:
        indent = len(line) - len(line.lstrip()) + 2
        print(wrapped(line, get_terminal_size().columns, indent) if sys.stderr.isatty() else line, file=sys.stderr)
