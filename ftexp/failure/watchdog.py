"""Watchdog that turns a hang into a crash: Ray restarts a dead worker, but never notices one without progress.

The loop announces each phase, which has its own time limit. If it is exceeded, the driver gets a message, the stacks of
all threads are written to the run directory, and the worker kills itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ftexp.config.schema import FailureConfig
from ftexp.failure.phases import BETWEEN, EVALUATION, SAVE, START, STEP, WAITED_IN
from ftexp.rundir.names import HANGS
from ftexp.storage.directory import Storage
from ftexp.wire.messages import Hung

if TYPE_CHECKING:
    from ftexp.job.group import ProcessGroup
    from ftexp.job.job import RunIdentity
    from ftexp.wire.channel import Channel

_MAX_POLL_S = 1.0
_LATER_S = 2.0
_GRACE_S = 10.0  # time beyond a limit after which even a process that can't run Python is ended

OnHang = Callable[[str, float, str], None]  # phase, seconds without progress, stacks of all threads


class Watchdog:
    """Watches one worker's loop from a thread. `limits`: seconds by phase; None: no limit."""

    def __init__(
        self,
        limits: dict[str, float | None],
        on_hang: OnHang,
        die: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._on_hang, self._die, self._clock = limits, on_hang, die, clock
        self.on_phase: Callable[[str], None] = lambda _: None  # called with each phase that is entered
        self._phase, self._since = START, clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start watching; does nothing if no phase has a limit."""
        given = [limit for limit in self._limits.values() if limit is not None]
        if given:
            self._thread = threading.Thread(target=self._watch, args=(min(given) / 4,), daemon=True, name="watchdog")
            self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        self.on_phase = lambda _: None
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str = STEP) -> None:
        """Note progress of the loop, which enters `phase`."""
        self._phase, self._since = phase, self._clock()
        self.on_phase(phase)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Apply the limit of `phase` within this block."""
        before = self._phase
        self.beat(phase)
        try:
            yield
        finally:
            self.beat(before)

    def check(self) -> None:
        """Report a hang and kill the process if the limit of the current phase is exceeded."""
        phase, still_s = self._phase, self._clock() - self._since
        limit = self._limits.get(phase)
        if limit is not None and still_s > limit:
            self._on_hang(phase, still_s, self._dump())
            self._die()

    def _watch(self, poll_s: float) -> None:
        while not self._ended.wait(min(poll_s, _MAX_POLL_S)):
            self.check()
            limit = self._limits.get(self._phase)
            if limit is not None:
                # for code that never releases the GIL: a timer in C, reset while this thread can run; it prints the
                # stack traces to the worker's log and exits
                faulthandler.dump_traceback_later(limit + _GRACE_S, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()

    def _dump(self) -> str:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()


def hang_limits(config: FailureConfig) -> dict[str, float | None]:
    """Return the time limit of each phase of the loop, in seconds without progress; None: no limit."""
    return {
        START: config.start_timeout_s,
        # later, so that the rank that keeps the others waiting reports first
        **dict.fromkeys(WAITED_IN, config.hang_timeout_s + _LATER_S if config.hang_timeout_s is not None else None),
        BETWEEN: config.hang_timeout_s,
        EVALUATION: config.evaluation_timeout_s,
        SAVE: config.save_timeout_s,
    }


def hang_reporter(run: RunIdentity, group: ProcessGroup, channel: Channel, run_dir: Storage) -> OnHang:
    """Return a callback that reports a hang to the driver and writes all threads' stacks to the run directory."""

    def report(phase: str, seconds: float, stacks: str) -> None:
        name = f"a{run.attempt}.r{group.rank}.txt"
        file = run_dir.child(HANGS, name).uri
        channel.send(Hung(group.rank, phase, seconds, file))
        # on a thread: the storage itself may hang
        writing = threading.Thread(target=run_dir.child(HANGS).write_bytes, args=(name, stacks.encode()), daemon=True)
        writing.start()
        writing.join(timeout=10)
        channel.flush()

    return report
