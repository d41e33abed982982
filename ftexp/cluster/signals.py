"""SIGTERM and SIGHUP outside of `fit_interruptibly`: Ray's own handler would end the process with exit code 15."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from ftexp.cluster.interruptible import Terminated


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise Terminated from this block on. Ray, started in the block, sets its own handler."""
    _set_handler(_raise)
    try:
        yield
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        raise Terminated from None  # Ray's handler turned SIGTERM into SystemExit
    finally:
        _set_handler(_raise)


def ignore_termination() -> None:
    """Ignore SIGTERM and SIGHUP from now on: the run's outcome and exit code are settled."""
    _set_handler(lambda *_: None)  # not SIG_IGN: children would inherit it


def _raise(*_: object) -> NoReturn:
    raise Terminated


def _set_handler(handler: Callable[..., object]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, handler)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` asks for that
        signal.signal(signal.SIGHUP, handler)
