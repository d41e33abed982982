"""Stopping Ray Data's pipelines from another thread than the one that waits for them.

Ray has no call for this, and the waiting thread can't be interrupted until a result arrives. But Ray's executor runs a
callback at each of its steps, ten times a second, and passes an exception from it to the waiting thread.
"""

from __future__ import annotations

import threading
from typing import Any

# global to the process, since Ray constructs the callbacks itself, and sends their class to its workers
_asked, _running = threading.Event(), threading.Event()


class Stopped(Exception):
    """Raised in the thread that waits for a pipeline that was asked to stop."""


class StopWhenAsked:
    """One of Ray Data's `custom_execution_callback_classes`: ends an execution once `ask_to_stop` was called."""

    def before_execution_starts(self, _executor: Any) -> None:
        """Note that a pipeline runs, which a request would stop."""
        _running.set()

    def on_execution_step(self, _executor: Any) -> None:
        """Raise Stopped if a stop was requested."""
        if _asked.is_set():
            raise Stopped

    def after_execution_succeeds(self, _executor: Any) -> None:
        """Note that no pipeline runs."""
        _running.clear()

    def after_execution_fails(self, _executor: Any, _error: Exception) -> None:
        """Note that no pipeline runs."""
        _running.clear()


def ask_to_stop() -> bool:
    """Stop current and later pipelines that have the callback; return whether one runs."""
    _asked.set()
    return _running.is_set()
