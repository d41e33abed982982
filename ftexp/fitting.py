"""Running Ray Train's fit() so that it can be stopped: by Ctrl-C, by SIGTERM, or because the run was taken over."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ftexp.errors import StorageError
from ftexp.lease import Lease

STOP_GRACE_S = 30.0  # for the save that a signal asks for


class Terminated(KeyboardInterrupt):
    """SIGTERM: somebody wants the machine back, and will start the command again elsewhere."""


def fit_interruptibly(fit: Callable[[], Any], lease: Lease, stop: Callable[[KeyboardInterrupt], bool]) -> Any:
    """Run fit() on a thread, so that Ctrl-C reaches this one instead of Ray's own handler. SIGTERM does the same.

    The first asks the workers for a last save by `stop`, which tells whether there are any; the second ends it at once.
    StorageError if another command has taken the run directory over.
    """
    with _interruptible():
        return _fit_on_thread(fit, lease, stop)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT (also where a shell's `&` left it ignored) and SIGTERM raise KeyboardInterrupt here."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, terminate)]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _fit_on_thread(fit: Callable[[], Any], lease: Lease, stop: Callable[[KeyboardInterrupt], bool]) -> Any:
    outcome: list[Any] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:  # raised again below, on the thread that waits
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="fit").start()
    stop_by: float | None = None
    first: KeyboardInterrupt | None = None
    # not thread.join(): a signal that comes while it waits may leave a thread that runs for dead (Python 3.11)
    while not done.is_set():
        try:
            done.wait(timeout=0.5)
        except KeyboardInterrupt as asked:
            if stop_by is not None or not stop(asked):
                raise
            first, stop_by = asked, time.monotonic() + STOP_GRACE_S
        if first is not None and stop_by is not None and time.monotonic() > stop_by:
            raise first
        if lease.lost is not None:
            raise StorageError(f"the run was taken over by {lease.lost}, since this process seemed dead: it stops here")
    if errors:
        raise errors[0]
    return outcome[0]
