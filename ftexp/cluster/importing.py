"""Imports that take seconds, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def importing_for_good() -> Iterator[None]:
    """Keep the collector from all that this block makes, now and later.

    Modules are hardly ever garbage, and looking for some takes a tenth of the time of importing torch and Ray. In a
    fork, the collector would write to every page that holds an object, and so copy it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_meanwhile(module: str) -> threading.Thread:
    """Import a module that takes seconds while Ray starts, which is mostly waiting for its processes; join it then."""
    # this module registers a lock for fork(). If the thread imported it while Ray's processes are forked, that lock
    # would be released without being held, and Python would print an error
    import concurrent.futures.thread  # noqa: F401

    def run() -> None:
        with importing_for_good():
            importlib.import_module(module)

    thread = threading.Thread(target=run, name="import")
    thread.start()
    return thread
