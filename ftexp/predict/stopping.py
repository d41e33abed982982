"""Stopping Ray Data's pipelines from another thread than the one that waits for them.

Ray has no call for that, and the one that waits can't be interrupted while nothing comes. But Ray's executor calls
back at each of its steps, ten times a second, and hands what is raised there to the one that waits.
"""

from __future__ import annotations

import threading
from typing import Any

# global to the process, since Ray makes the callbacks itself, and sends their class to its workers
_asked, _running = threading.Event(), threading.Event()


class Stopped(Exception):
    """Raised to the caller that waits for a pipeline once it was asked to stop."""


class StopWhenAsked:
    """One of Ray Data's `custom_execution_callback_classes`: ends an execution once `ask_to_stop` was called."""

    def before_execution_starts(self, _executor: Any) -> None:
        """Note that it would be heard."""
        _running.set()

    def on_execution_step(self, _executor: Any) -> None:
        """Raise Stopped if it was requested."""
        if _asked.is_set():
            raise Stopped

    def after_execution_succeeds(self, _executor: Any) -> None:
        """Note that nobody would hear it."""
        _running.clear()

    def after_execution_fails(self, _executor: Any, _error: Exception) -> None:
        """Note that nobody would hear it."""
        _running.clear()


def ask_to_stop() -> bool:
    """Have pipelines with the callback end, now and later; whether one runs."""
    _asked.set()
    return _running.is_set()
