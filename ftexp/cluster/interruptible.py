"""Interruptible fit() of Ray Train: a signal, a process that takes the run over, or Ray's death stops it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ftexp.errors import RayLostError, StorageError
from ftexp.storage.lease import Lease

_LOOK_EVERY_S = 0.1
STOP_GRACE_S = 30.0  # time limit of the final checkpoint after a signal
_END_WITHIN_S = 2.0
_RETRY_EVERY_S = 0.01
# one request may arrive as two signals: `uv run` and bash forward a SIGTERM or SIGHUP that the whole group received
_REPEAT_WITHIN_S = 2.0


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: the machine is being reclaimed, and the command may be started again elsewhere."""


def fit_interruptibly(
    fit: Callable[[], Any],
    lease: Lease,
    stop: Callable[[KeyboardInterrupt], bool],
    failed: Callable[[], Exception | None] = lambda: None,
    lost: Callable[[], str | None] = lambda: None,
) -> Any:
    """Run fit() on a thread, so that SIGINT, SIGTERM and SIGHUP reach this thread, not Ray's own handler.

    stop: called at the first signal; asks the workers for a final checkpoint, and returns whether there are any.
        A second signal ends fit() at once.
    failed: returns an error from elsewhere in this process, which is raised and ends the run; None if there is none.
    lost: returns why Ray is dead; None while it runs.

    StorageError if another process has taken the run directory over; RayLostError if Ray has died.
    """
    with collected_signals() as asked:
        require = functools.partial(_require, failed, lost, asked)
        return _fit_on_thread(fit, functools.partial(_wait, lease, stop, require, asked), require)


@contextlib.contextmanager
def collected_signals() -> Iterator[list[KeyboardInterrupt]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list, without interrupting anything.

    SIGINT is collected even if a shell's `&` left it ignored. SIGHUP (the terminal is gone) stays ignored if it was:
    `nohup` asks for that. SIGTERM and SIGHUP within _REPEAT_WITHIN_S are collected as one.
    """
    asked: list[KeyboardInterrupt] = []
    terminated_at: float | None = None
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    kinds: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        kinds[signal.SIGHUP] = Terminated

    def collect(number: int, _: object) -> None:
        nonlocal terminated_at
        if kinds[number] is Terminated:
            now, since = time.monotonic(), terminated_at
            if since is not None and now - since < _REPEAT_WITHIN_S:
                return
            terminated_at = now
        asked.append(kinds[number]())

    before = {number: signal.signal(number, collect) for number in kinds}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fit_on_thread(
    fit: Callable[[], Any], wait: Callable[[threading.Event], None], require: Callable[[Exception | None], None]
) -> Any:
    outcome: list[Any] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:  # raised again below, on the waiting thread
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, daemon=True, name="fit")
    thread.start()
    try:
        wait(done)
    except BaseException:
        _interrupt(thread, done)
        raise
    if errors:
        if isinstance(errors[0], Exception):
            require(errors[0])  # the cause, where it is known; fit()'s own error doesn't show it
        raise errors[0]
    return outcome[0]


def _require(
    failed: Callable[[], Exception | None],
    lost: Callable[[], str | None],
    asked: list[KeyboardInterrupt],
    error: Exception | None,
) -> None:
    """Raise an error from elsewhere in the process; RayLostError if Ray has died, or the signal that came before that.

    error: the exception that ended fit(); None while it runs.
    """
    if error is None and (other := failed()) is not None:
        raise other
    if (reason := lost()) is not None:
        died = RayLostError(reason)
        if asked:
            raise asked[0] from died
        raise died from error


def _wait(
    lease: Lease,
    stop: Callable[[KeyboardInterrupt], bool],
    require: Callable[[Exception | None], None],
    asked: list[KeyboardInterrupt],
    done: threading.Event,
) -> None:
    stop_by: float | None = None
    # not thread.join(): a signal during it may mark a running thread as finished (Python 3.11)
    while not done.wait(timeout=_LOOK_EVERY_S):
        if asked and stop_by is None:
            if not stop(asked[0]):
                raise asked[0]
            stop_by = time.monotonic() + STOP_GRACE_S
        elif len(asked) > 1:
            raise asked[1]
        elif stop_by is not None and time.monotonic() > stop_by:
            raise asked[0]
        require(None)
        if lease.lost is not None:
            raise StorageError(f"the run was taken over by {lease.lost}, since this process seemed dead: it stops here")


def _interrupt(thread: threading.Thread, done: threading.Event) -> None:
    """Interrupt a thread; one that stays in C code is left running.

    If Ray were shut down while a thread uses it, Ray would exit the process with code 1.
    """
    assert thread.ident is not None
    ends_by = time.monotonic() + _END_WITHIN_S
    is_due = True
    hook = sys.unraisablehook

    def again(raised: sys.UnraisableHookArgs) -> None:  # raised where it can't propagate, such as in a __del__
        nonlocal is_due
        if raised.exc_type is KeyboardInterrupt:
            is_due = True
        else:
            hook(raised)

    sys.unraisablehook = again
    try:
        while not done.is_set() and time.monotonic() < ends_by:
            # in Python 3.11, a thread that is being started has its creator's id: it would get the exception instead,
            # and its creator would wait for it for ever
            if is_due and all(other.ident is not None for other in threading.enumerate()):
                is_due = False
                thread_id, kind = ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread_id, kind)
            done.wait(_RETRY_EVERY_S)
    finally:
        sys.unraisablehook = hook
