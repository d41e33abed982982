"""Slow imports without garbage collection."""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disable garbage collection in this block.

    Modules are hardly ever garbage, and collecting takes a tenth of the time of importing torch and Ray.
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
    """Disable garbage collection in this block, and exclude all objects that exist after it for good.

    In a fork, the collector would write to every page that holds an object, and so copy it. Not for a program that
    calls ftexp.api: reference cycles among its excluded objects would never be freed.
    """
    with uncollected():
        try:
            yield
        finally:
            gc.freeze()


def import_meanwhile(module: str) -> threading.Thread:
    """Import a slow module on a thread while Ray starts, which is mostly waiting; the caller joins the thread."""
    # the module below registers a lock for fork(). If the thread imported it while Ray's processes are forked, that
    # lock would be released without being held, and Python would print an error
    import concurrent.futures.thread  # noqa: F401

    def run() -> None:
        with uncollected():
            importlib.import_module(module)

    thread = threading.Thread(target=run, name="import")
    thread.start()
    return thread
