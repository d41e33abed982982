"""Lines wrapped between words to the width of a terminal, which itself would break them anywhere."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from shutil import get_terminal_size
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_TITLE = re.compile(r"\S+( \S+)* {2,}(?=\S)")  # "test accuracy  0.9778": the first of two columns


def wrapped(text: str, width: int) -> str:
    """Return `text` in lines of at most `width` characters; continuation lines are indented to the text above.

    A word longer than a line is not broken, so that paths can be copied.
    """
    return "\n".join(
        textwrap.fill(
            line, max(width, 1), subsequent_indent=_indent(line, width), break_long_words=False, break_on_hyphens=False
        )
        for line in text.split("\n")
    )


def _indent(line: str, width: int) -> str:
    title = _TITLE.match(line)
    wanted = title.end() if title else len(line) - len(line.lstrip()) + 2
    return " " * min(wanted, width // 2)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line; on a terminal, wrap it."""
    shown = wrapped(text, console.width) if console.is_terminal else text
    console.print(shown, style=style or None, markup=False, soft_wrap=True)


def print_wrapped(lines: Iterable[str], stream: TextIO) -> None:
    """Print `lines` and flush, wrapped if `stream` is a terminal."""
    for line in lines:
        print(wrapped(line, get_terminal_size().columns) if stream.isatty() else line, file=stream, flush=True)
