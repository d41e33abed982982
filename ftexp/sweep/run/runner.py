"""Runs trials in parallel, as many as fit, each in its own process; the end of one doesn't affect the others."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftexp.cli.exit_codes import EXIT_INTERRUPTED, EXIT_TERMINATED
from ftexp.cluster.interruptible import STOP_GRACE_S, Terminated
from ftexp.cluster.resources import Workers, spare_of
from ftexp.config.schema import Config
from ftexp.errors import RayLostError, SweepFailedError
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, RUNNING, read_state
from ftexp.rundir.sweep_record import STOPPED, WAITING, Trial
from ftexp.storage.directory import Storage
from ftexp.sweep.run.trial import TrialRequest

_SCRIPT = Path(__file__).with_name("trial.py")
_LOOK_EVERY_S = 0.1
_MAX_RESTARTS = 3  # restarts of a killed driver, even if failure.max_failures allows more
_CLOSE_WITHIN_S = 15.0  # time for trials to close their records after Ray's death
_END_WITHIN_S = STOP_GRACE_S + 15.0  # time for trials to stop when asked; then they are killed
LOG_FILE = "train.log"


@dataclass
class TrialProcess:
    """A trial and everything that is needed to run it."""

    trial: Trial
    config: Config
    overrides: list[str]
    workers: Workers
    run_dir: Storage
    popen: subprocess.Popen[bytes] | None = None
    began: float = 0.0  # time.monotonic() of its start in this invocation
    began_at_epoch: int = 0
    num_starts: int = 0
    kill_at: float = float("inf")  # time.monotonic(); set for a trial that was asked to stop early

    @property
    def needs(self) -> dict[str, float]:
        """Resources that it needs with its minimum number of workers."""
        spare = self.workers.evaluation_resources if spare_of(self.config) else {}
        each = self.workers.resources_per_worker.items()
        return {name: self.workers.min_workers * amount + spare.get(name, 0) for name, amount in each}

    @property
    def log(self) -> Path:
        """Local file for its output, whatever the storage."""
        directory = self.run_dir.local_path
        if directory is None:
            directory = Path(tempfile.gettempdir()) / self.run_dir.parent.name / self.run_dir.name
        return directory / LOG_FILE


@dataclass
class Runner:
    """Runner of trials: starts, watches and stops them. `changed` is called for every change of a trial's status."""

    processes: list[TrialProcess]
    capacity: dict[str, float]  # capacity of the cluster
    max_concurrent: int | None  # trials at once
    python: list[str]  # a command line up to the script
    request: Callable[[TrialProcess], TrialRequest]
    changed: Callable[[TrialProcess], None]
    tick: Callable[[], None]  # called ten times a second
    asked: list[KeyboardInterrupt] = field(default_factory=list)  # signals, in order of arrival
    next_process: Callable[[], TrialProcess | None] = lambda: None  # called if there is room for another
    min_needs: dict[str, float] = field(default_factory=dict)  # minimum needs of such a process
    lost: Callable[[], str | None] = lambda: None  # returns why the trials' Ray is dead; None while it runs
    _num_passed: int = 0
    _kill_at: float = float("inf")

    def run(self) -> None:
        """Run until every trial has ended.

        KeyboardInterrupt once all have stopped because of a signal. RayLostError once all have stopped because Ray has
        died: they are recorded as interrupted.
        """
        try:
            self._start_what_fits()
            while self._running():
                self.tick()
                time.sleep(_LOOK_EVERY_S)
                self._pass_signals_on()
                if (reason := self.lost()) is not None:
                    self._let_all_end()
                    raise self.asked[0] if self.asked else RayLostError(reason)
                for process in self._running():
                    assert process.popen is not None
                    if (code := process.popen.poll()) is not None:
                        self._ended(process, code)
                    elif time.monotonic() > process.kill_at:
                        process.popen.kill()
                self._start_what_fits()
        finally:
            self._kill_all()  # none are left, unless this method raised
        if self.asked:
            raise self.asked[0]

    def _running(self) -> list[TrialProcess]:
        return [process for process in self.processes if process.popen is not None]

    def _waiting(self) -> list[TrialProcess]:
        return [process for process in self.processes if process.trial.status == WAITING]

    def _start_what_fits(self) -> None:
        if self.asked:
            return
        for process in self._waiting():
            if self._has_room(process.needs):
                self._start(process)
        while not self._waiting() and self._has_room(self.min_needs) and (new := self.next_process()) is not None:
            self.processes.append(new)
            if new.trial.status != WAITING:  # there is nothing to run
                self.changed(new)
            elif self._has_room(new.needs):
                self._start(new)

    def _has_room(self, needs: dict[str, float]) -> bool:
        running = self._running()
        if self.max_concurrent is not None and len(running) >= self.max_concurrent:
            return False
        # nothing running: let Ray detect and report a smaller cluster
        return not running or fits(needs, self.capacity, [other.needs for other in running])

    def stop_early(self, process: TrialProcess, epoch: int) -> None:
        """Stop a running trial after a final checkpoint, because of its value after `epoch`; this is no failure."""
        assert process.popen is not None
        process.trial.stopped_at, process.kill_at = epoch, time.monotonic() + _END_WITHIN_S
        process.popen.send_signal(signal.SIGINT)

    def _start(self, process: TrialProcess) -> None:
        process.num_starts += 1
        try:
            self._launch(process)
        except OSError as error:  # from the disk with its output, or from the store
            self._set(process, FAILED, f"it could not start: {error}")
            return
        self._set(process, RUNNING)

    def _launch(self, process: TrialProcess) -> None:
        process.log.parent.mkdir(parents=True, exist_ok=True)
        state = read_state(process.run_dir)
        process.began, process.began_at_epoch = time.monotonic(), state.epoch if state is not None else 0
        with process.log.open("ab") as log:
            process.popen = subprocess.Popen(
                [*self.python, str(_SCRIPT), json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C in a terminal reaches only the sweep, which forwards it once
            )
        assert process.popen.stdin is not None
        try:
            process.popen.stdin.write(pickle.dumps(self.request(process)))
            process.popen.stdin.flush()
        except BrokenPipeError:  # its exit is noticed elsewhere
            pass

    def _ended(self, process: TrialProcess, code: int) -> None:
        assert process.popen is not None
        assert process.popen.stdin is not None
        process.popen.stdin.close()
        process.popen = None
        of_ended = (EXIT_INTERRUPTED, EXIT_TERMINATED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)
        was_ended = code < 0 or code in of_ended  # by a signal, from this process or another
        stopped_early = process.trial.stopped_at is not None and was_ended
        if code != 0 and not stopped_early:
            process.trial.stopped_at = None  # it failed before it could be stopped
        if code == 0:
            self._set(process, FINISHED)
        elif stopped_early:
            self._set(process, STOPPED)
        elif self.asked and code in of_ended:
            self._set(process, INTERRUPTED)
        elif was_ended and process.num_starts <= self._restarts(process):
            self._set(process, WAITING)  # its driver was stopped from outside: it resumes, as the command would
        else:
            self._set(process, FAILED, _reason(process, code))

    def _restarts(self, process: TrialProcess) -> int:
        allowed = process.config.failure.max_failures
        return _MAX_RESTARTS if allowed == -1 else min(allowed, _MAX_RESTARTS)

    def _set(self, process: TrialProcess, status: str, error: str | None = None) -> None:
        process.trial.status, process.trial.error = status, error
        self.changed(process)

    def _pass_signals_on(self) -> None:
        """Forward every signal to every trial: the first asks for a final checkpoint, the second ends them at once."""
        for interrupt in self.asked[self._num_passed :]:
            number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
            for process in self._running():
                assert process.popen is not None
                process.popen.send_signal(number)
            self._kill_at = min(self._kill_at, time.monotonic() + _END_WITHIN_S)
        self._num_passed = len(self.asked)
        if time.monotonic() > self._kill_at:
            self._kill_all()

    def _let_all_end(self) -> None:
        """Wait until the trials, which notice Ray's death themselves, have closed their records; then kill them."""
        ends_by = time.monotonic() + _CLOSE_WITHIN_S
        for process in self._running():
            assert process.popen is not None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, ends_by - time.monotonic()))
            process.popen.kill()
            process.popen = None
            self._set(process, INTERRUPTED)

    def _kill_all(self) -> None:
        for process in self._running():
            assert process.popen is not None
            os.kill(process.popen.pid, signal.SIGKILL)


def config_of(process: TrialProcess) -> Config:
    """Return a trial's config; a restarted trial resumes, whatever `resume` says."""
    return process.config if process.num_starts == 1 else dataclasses.replace(process.config, resume="auto")


def fits(needs: dict[str, float], capacity: dict[str, float], taken: list[dict[str, float]]) -> bool:
    """Return whether `capacity` has `needs` in addition to what is taken, within rounding."""
    return all(
        amount <= capacity.get(name, 0) - sum(other.get(name, 0) for other in taken) + 1e-6
        for name, amount in needs.items()
    )


def _reason(process: TrialProcess, code: int) -> str:
    """Return why a trial failed: the reason in its run.json, else its last printed line."""
    with contextlib.suppress(OSError):  # the store is down
        state = read_state(process.run_dir)
        if state is not None and state.status == FAILED and state.error:
            return state.error
    if code < 0:
        return f"its driver was killed by {signal.Signals(-code).name}"
    lines = [line for line in process.log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].removeprefix('ftexp: ') if lines else 'nothing was printed'} (exit code {code})"


def failures_of(processes: Sequence[TrialProcess]) -> SweepFailedError | None:
    """Return an error with a line for each failed trial and its reason; None if none failed."""
    failed = [process.trial for process in processes if process.trial.status == FAILED]
    if not failed:
        return None
    title = f"{len(failed)} of {len(processes)} trials failed:"
    return SweepFailedError("\n".join([title, *(f"{trial.name}: {trial.error}" for trial in failed)]))


def max_threads(processes: Sequence[TrialProcess]) -> int:
    """Return the largest number of threads of any trial's workers: one preloaded process serves them all."""
    return max(process.workers.num_threads for process in processes)


def require_room(processes: Sequence[TrialProcess], capacity: dict[str, float]) -> list[str]:
    """Return a line for each trial that the cluster could never hold."""
    return [
        f"{process.trial.name} needs {_named(process.needs)}, and the cluster has {_named(capacity, process.needs)}"
        for process in processes
        if not fits(process.needs, capacity, [])
    ]


def _named(amounts: dict[str, float], names: Any = None) -> str:
    return ", ".join(f"{amounts.get(name, 0):g} {name}" for name in names or amounts)
