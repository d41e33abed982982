"""The start and the end of every command. Imports nothing slow, not even Hydra: some commands need no more."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence

from ftexp.cli.exit_codes import interrupted_code, print_error
from ftexp.errors import FtexpError


def prepare_streams() -> None:
    """Make standard output and error accept any text: unencodable characters are replaced; closed streams discard it.

    A command calls this first: a file that is opened earlier would get the number of a closed stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def command_words(doc: str | None) -> list[str]:
    """Prepare the streams and return the arguments; if these ask for help, print `doc` and exit."""
    prepare_streams()
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(doc)
        sys.exit(0)
    return words


@contextlib.contextmanager
def exiting_on_error() -> Iterator[None]:
    """Print an FtexpError of this block, and exit with its code; after a signal, exit with the signal's code."""
    try:
        yield
    except FtexpError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        sys.exit(interrupted_code(interrupt))


def with_run(words: Sequence[str]) -> list[str]:
    """Return the words, with the first one that is neither an override nor an option as run=<word>."""
    for place, word in enumerate(words):
        key, is_override, _ = word.partition("=")
        if not word.startswith("-") and (not is_override or "/" in key):
            return [*words[:place], f"run={word}", *words[place + 1 :]]
    return list(words)


def as_value(word: str) -> str:
    """Return the value of an argument, which may be written as run=<value> or sweep=<value>."""
    return re.sub(r"^(run|sweep)=", "", word)
