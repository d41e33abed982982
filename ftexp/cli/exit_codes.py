"""Errors of a command, as a message and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ftexp.cli.wrapping import print_wrapped
from ftexp.errors import ConfigError, FtexpError

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75  # by SIGTERM or SIGHUP: EX_TEMPFAIL, the same command resumes


def interrupted_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code after Ctrl-C or SIGTERM.

    Compares by name, since `cluster.interruptible` is only imported where something ran.
    """
    return EXIT_TERMINATED if type(interrupt).__name__ == "Terminated" else EXIT_INTERRUPTED


def exit_code_of(run: Callable[[], object]) -> int:
    """Run a training outside of Hydra; print its errors and return an exit code."""
    try:
        run()
    except FtexpError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        return interrupted_code(interrupt)
    return 0


def print_error(error: FtexpError) -> None:
    """Print an error for the user: no traceback, and a line for each if there are several."""
    lines = str(error).splitlines()
    title = "the config is invalid" if isinstance(error, ConfigError) else type(error).__name__
    if len(lines) == 1:
        print_wrapped([f"ftexp: {lines[0]}"], sys.stderr)
    else:
        print_wrapped([f"ftexp: {title}:", *(f"  {line}" for line in lines)], sys.stderr)
