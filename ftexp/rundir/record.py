"""A run's records: run.json, metrics.jsonl and .csv, events.jsonl. Only the driver writes them; the hub feeds it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from ftexp.config.schema import CORRUPTION, NON_FINITE
from ftexp.errors import StorageError
from ftexp.rundir.clock import RunClock
from ftexp.rundir.events import EventLog
from ftexp.rundir.lineage import Lineage
from ftexp.rundir.metrics import MetricsLog, write_metrics_csv
from ftexp.rundir.names import RUN_FILE
from ftexp.rundir.state import FAILED, FINISHED, INTERRUPTED, Failure, RunState
from ftexp.storage.append_log import as_json
from ftexp.storage.directory import Storage
from ftexp.wire import events
from ftexp.wire.messages import (
    Begin,
    Evaluated,
    ForgetSnapshots,
    Happened,
    Hello,
    Lost,
    Message,
    Metrics,
    Raised,
    Ready,
    Sync,
    Synced,
    Tick,
)

_FLUSH_INTERVAL_S = 10.0  # time between copies to an object store
_HEARTBEATS = (Hello, Ready, Tick, Metrics, Sync)  # only workers send these


class RunRecord:
    """Writer of an invocation's records. The hub calls `handle`, with one message at a time.

    Args:
        storage: the run directory.
        state: the content of run.json.
        score: see `MetricsLog`.
        clock: seconds since 1970.
        noticed_at, steady: see `RunClock`.
    """

    def __init__(
        self,
        storage: Storage,
        state: RunState,
        score: tuple[str, str],
        clock: Callable[[], float] = time.time,
        noticed_at: float | None = None,
        steady: Callable[[], float] = time.monotonic,
    ):
        self.storage, self.state = storage, state
        self.clock, self._steady = RunClock(state, clock, steady, noticed_at), steady
        self.metrics, self._events = MetricsLog(storage, state, score), EventLog(storage, state)
        self._flushed = steady()  # time of the last write, or of an attempt to write
        self.problem: str | None = None  # why the last write failed; None if it succeeded
        self.observers: list[Callable[[events.Event, float], None]] = []  # called with each event and its time
        self.heard_at: float | None = None  # when a worker last sent one of _HEARTBEATS
        self.died_rank: int | None = None  # rank of the first process that the current attempt lost
        self._num_written = len(state.failures)  # number of failures that run.json holds
        self._workers: dict[int, Hello] = {}  # workers of the current attempt, by rank
        self._lineage = Lineage()
        self._is_ready = False  # whether the current attempt trains; before, its workers report step 0

    def handle(self, message: Message) -> Message | None:
        """Record a message; return the answer to a `Hello` or `Sync`."""
        if isinstance(message, _HEARTBEATS):
            self.heard_at = self.clock.now()
            self.clock.heard()
        answer = self._record(message)
        if self._steady() - self._flushed > _FLUSH_INTERVAL_S:
            self.write()
        return answer

    def _record(self, message: Message) -> Message | None:
        match message:
            case Hello():
                return self._hello(message)
            case Ready():
                self._ready(message)
            case Tick(step, epoch):
                self._reached(step, epoch)
            case Metrics():
                self._reached(message.step, message.epoch)
                self.metrics.add(message)
            case Evaluated(step, epoch, values=values) if values:
                self.metrics.add(Metrics("val", step, epoch, values, time=message.time))
            case Happened(event):
                self._happened(event, message.time)
            case Raised():
                if self._is_ready:  # the exact step: the same error at the same step is treated as a bug
                    self._reached(message.step, self.state.epoch)
                self.event(events.Raised(message.rank, message.traceback))
                self.clock.process_ended(message.time)
            case ForgetSnapshots():
                self._lineage.broke()
            case Lost(rank):
                self.clock.process_ended(message.time)
                # set here, not by Raised: a rank may raise, and be reported first, because this one had died
                self.died_rank = rank if self.died_rank is None else self.died_rank
            case Sync(number):
                self.write()
                return Synced(number, self.problem)
        return None

    def event(self, event: events.Event, when: float | None = None) -> None:
        """Add a line to events.jsonl."""
        when = self.clock.now() if when is None else when
        self._events.add(event, when)
        for observe in self.observers:
            observe(event, when)

    def past_events(self) -> list[dict[str, Any]]:
        """Return the lines of events.jsonl."""
        return self._events.lines()

    def late_event(self, event: events.Event) -> None:
        """Like `event`, after the records were closed; OSError if it can't be written."""
        self._events = EventLog(self.storage, self.state)
        self.event(event)
        self._events.close()

    def write(self) -> None:
        """Write run.json, and update the copies on an object store.

        An error stays in `problem` until a later write succeeds: a full disk must not end the training.
        """
        self._attempt_to(self._write)

    def _attempt_to(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.problem = str(error)
        else:
            self.problem = None
        finally:  # from the end: a store that doesn't answer may block as long as the interval, and the hub with it
            self._flushed = self._steady()

    def _write(self) -> None:
        self.clock.sum_up()
        self.storage.write_bytes(RUN_FILE, as_json(dataclasses.asdict(self.state), indent=1).encode())
        self._num_written = len(self.state.failures)
        self.metrics.sync()
        self._events.sync()

    def _write_last(self) -> None:
        self._write()
        write_metrics_csv(self.storage, self.metrics.points())
        self.metrics.close()
        self._events.close()

    def close(self, status: str, error: str | None = None) -> None:
        """Record how the invocation ended; StorageError if the records can't be written."""
        self.state.status, self.state.error = status, error
        ends = {FINISHED: events.Finished(), FAILED: events.Failed(error), INTERRUPTED: events.Interrupted()}
        self.event(ends[status])
        self._attempt_to(self._write_last)
        if self.problem is not None:
            raise StorageError(f"the records of {self.storage.uri} can't be written: {self.problem}; make room there")

    def fail(
        self, cause: str, rank: int | None, error: str, decision: str = "", reported_late: bool = False
    ) -> Failure:
        """Record that the current attempt's worker group failed.

        reported_late: see `RunClock.failed`.
        """
        progressed = self.clock.has_progressed
        failure = Failure(
            attempt=self.state.attempts,
            cause=cause,
            rank=rank,
            node=self.node_of(rank),
            progressed=progressed,
            decision=decision,
            step=self.state.step,
            error=error,
            seconds_to_detect=self.clock.failed(reported_late),
        )
        self.state.failures.append(failure)
        self.died_rank = None
        if cause in (CORRUPTION, NON_FINITE):  # the state itself is bad; only checkpoints are verified
            self._lineage.broke()
        fields = {each.name: getattr(failure, each.name) for each in dataclasses.fields(events.Failure)}
        self.event(events.Failure(**fields), self.clock.noticed_at)
        self.write()
        return failure

    def not_replaced(self) -> Failure:
        """Correct the decision about the last failure, since all workers restart after all; return the failure."""
        failure = self.state.failures[-1]
        failure.decision += ", which failed: restarting the workers"
        return failure

    @property
    def unwritten_failures(self) -> list[Failure]:
        """The failures that run.json may lack, since it could not be written."""
        return self.state.failures[self._num_written :]

    def add_unwritten(self, failures: Sequence[Failure]) -> None:
        """Add the failures that this process noted before it restarted, except those that run.json already has."""
        self.state.failures += [failure for failure in failures if failure not in self.state.failures]

    def pids(self) -> list[int]:
        """Return the process ids of the current attempt's workers, by rank."""
        world_size = (self.state.world_sizes or [0])[-1]
        return [self._workers[rank].pid for rank in range(world_size) if rank in self._workers]

    def node_of(self, rank: int | None) -> str | None:
        """Return the node of a rank of the current attempt; None if it is unknown."""
        return self._workers[rank].node if rank in self._workers else None

    def is_of_the_past(self, lost: Lost) -> bool:
        """Return whether a lost process is of an earlier worker group: its successor may already have connected."""
        known = self._workers.get(lost.rank)
        return known is not None and known.pid != lost.pid

    def _hello(self, hello: Hello) -> Begin | None:
        state = self.state
        self._workers[hello.rank], self._is_ready = hello, False
        if hello.replaces:
            self.died_rank = None
            came = events.WorkerReplaced(hello.rank, hello.pid, hello.node, hello.hot_start)
            self.event(came, self.clock.attempt_started())
            return self._begin()
        if hello.rank != 0:
            return None
        state.attempts += 1
        state.world_sizes.append(hello.world_size)
        self.died_rank = None
        event = events.AttemptStarted(hello.world_size, hello.pid, hello.node, hello.hot_start)
        self.event(event, self.clock.attempt_started())
        self.write()
        return self._begin()

    def _begin(self) -> Begin:
        state = self.state
        return Begin(state.attempts, state.skipped, state.accumulate_steps, self._lineage.as_pairs())

    def _ready(self, ready: Ready) -> None:
        self.state.model = {"arguments": ready.arguments, "num_parameters": ready.num_parameters}
        self.state.hardware, self._is_ready = ready.hardware, True
        self._forget_corrupt(ready.step)
        when = self.clock.ready(ready.step, ready.source)
        self._lineage.began(self.state.attempts, ready.step)
        if ready.weights:
            self.event(events.WeightsLoaded(ready.weights))
        self.event(events.Ready(ready.device, self.pids(), ready.source), when)
        self.write()

    def _forget_corrupt(self, step: int) -> None:
        """Remove points after `step`, where training resumes, if corrupt weights may have produced them."""
        recent = itertools.takewhile(lambda failure: failure.steps_replayed is None, reversed(self.state.failures))
        if any(failure.cause == CORRUPTION for failure in recent):
            self._attempt_to(lambda: self.metrics.forget_after(step))

    def _reached(self, step: int, epoch: int) -> None:
        for event in self.clock.reached(step, epoch):
            self.event(event)

    def _happened(self, event: events.Event, when: float) -> None:
        match event:
            case events.CheckpointSaved(checkpoint=name):
                self.state.checkpoint = name
            case events.StepSkipped(positions=positions) | events.RolledBack(positions=positions):
                self.state.skipped.append(positions)
            case events.StoppedEarly():
                self.state.stopped = event.fields
            case events.SnapshotsTaken():
                self.state.snapshots = event.fields
        self.event(event, when)
        if isinstance(event, events.CheckpointSaved):
            self.write()
