"""Imports that take seconds, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the collector from running in this block.

    Modules are hardly ever garbage, and looking for some takes a tenth of the time of importing torch and Ray.
    """
    was_enabled = gc.isenabled()  # a program that calls ftexp.api may have switched it off
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def importing_for_good() -> Iterator[None]:
    """As `uncollected`, and afterwards the collector never looks at what this process has.

    In a fork, it would write to every page that holds an object, and so copy it. Not for a program that calls
    ftexp.api: what it has, and drops later, would never be freed where it is part of a cycle.
    """
    with uncollected():
        try:
            yield
        finally:
            gc.freeze()


def import_meanwhile(module: str) -> threading.Thread:
    """Import a module that takes seconds while Ray starts, which is mostly waiting for its processes; join it then."""
    # this module registers a lock for fork(). If the thread imported it while Ray's processes are forked, that lock
    # would be released without being held, and Python would print an error
    import concurrent.futures.thread  # noqa: F401

    def run() -> None:
        with uncollected():
            importlib.import_module(module)

    thread = threading.Thread(target=run, name="import")
    thread.start()
    return thread
