"""The hub's handler: records messages of workers and controller, decides what follows, and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable

from ftexp.cluster.interruptible import STOP_GRACE_S
from ftexp.config.schema import Config
from ftexp.driver.decider import Decider
from ftexp.driver.printer import Printer
from ftexp.driver.restart import Restart
from ftexp.driver.terminal import Terminal
from ftexp.driver.worker_group import Start, WorkerGroup
from ftexp.errors import ConfigError, FtexpError, RayLostError
from ftexp.failure.causes import CRASH, RAY, STARTUP, Cause, Ending, as_death, find_cause
from ftexp.failure.policy import Action
from ftexp.rundir.record import RunRecord
from ftexp.wire import events
from ftexp.wire.hub import Hub
from ftexp.wire.messages import (
    MEMORY,
    REPLACED,
    ControllerDied,
    CouldNotStart,
    EvaluateCheckpoint,
    GroupFailed,
    Happened,
    Hello,
    KillDriver,
    Lost,
    Message,
    Ready,
    Retry,
    Stop,
)

_CONTROLLER_DIED = Cause(CRASH, None, "Ray Train's controller died, and its workers with it", Ending.DIED)


class Supervisor:
    """Passes each message to the records, the decider and the printer. For the last three arguments see `Decider`."""

    def __init__(
        self,
        record: RunRecord,
        terminal: Terminal,
        config: Config,
        num_before: int | None = None,
        no_new_ray: str | None = None,
    ) -> None:
        self._record, self._terminal, self._config = record, terminal, config
        self.group = WorkerGroup(Start.FIRST if num_before is None else Start.AFTER_FAILURE)
        self._decider = Decider(record, config, num_before, no_new_ray)
        self._printer = Printer(terminal, record, self.group, config)
        self._asked = KeyboardInterrupt()
        self._replaces = False  # whether a worker is to be replaced, and no worker has started since
        self.on_evaluation_wanted: Callable[[EvaluateCheckpoint], None] = lambda _: None
        # called with each recorded message
        self.on_message: Callable[[Message], None] = lambda _: None
        self.nccl_findings: Callable[[int], list[str]] = lambda _: []  # returns the files of a failed attempt

    def handle(self, message: Message) -> Message | None:
        """Handle a message and return the answer. The hub calls this for one message at a time."""
        match message:
            case GroupFailed():
                cause = Cause(message.cause, message.rank, message.error, Ending(message.ending))
                return self._failed(as_death(cause, self._record.died_rank), others_wait=message.others_wait)
            case ControllerDied():  # same policy as for a worker, but the driver must call fit() again
                return self._failed(_CONTROLLER_DIED)
            case CouldNotStart(error):
                self._could_not_start(error)
                return None
            case Hello() if (stop := self._refusal()) is not None:
                return stop
            case Lost() if self._record.is_of_the_past(message):
                return None
            case Happened(events.Waiting(reason)) if not self.group.is_news(reason):
                return None
            case KillDriver():
                os.kill(os.getpid(), signal.SIGKILL)
            case EvaluateCheckpoint():
                self.on_evaluation_wanted(message)
                return None
            case Happened(events.Straggler() | events.StragglerOver() as event):
                located = dataclasses.replace(event, node=self._record.node_of(event.rank))
                message = dataclasses.replace(message, event=located)
        if isinstance(message, Hello) and self._replaces and (message.replaces or message.rank == 0):
            self._replaces = False
            if not message.replaces:
                self._printer.not_replaced(self._record.not_replaced())
        start = self.group.start
        answer = self._record.handle(message)
        self._decider.note(message)
        self.group.note(message)
        self.on_message(message)
        self._printer.message(message)
        if isinstance(message, Ready):
            self._ready(message, start)
        return answer

    def _refusal(self) -> Stop | None:
        """Return Stop if the run was given up, else None: Ray's controller starts workers without waiting for us."""
        if self._decider.given_up is None and self._decider.leaving:
            # the group before ended by an announced preemption, for which Ray calls no failure callback
            self._failed(as_death(find_cause({}), self._record.died_rank), reported_late=True)
        return Stop(str(self._decider.given_up)) if self._decider.given_up is not None else None

    def _failed(self, cause: Cause, reported_late: bool = False, others_wait: bool = False) -> Retry | Stop:
        """Decide about a failure, record and print it; return the answer to the controller.

        reported_late: see `RunClock.failed`.
        """
        if self._decider.given_up is not None:  # the failure is of workers that were asked to stop
            return Stop(str(self._decider.given_up))
        cause, decision = self._decider.decide(cause, others_wait)
        self.group.failed()
        failure = self._record.fail(decision.cause, cause.rank, cause.error, decision.reason, reported_late)
        raised = self._printer.failure(failure)
        self._note_nccl(failure.attempt)
        self._replaces = decision.action is Action.REPLACE
        if decision.action is not Action.STOP:
            return Retry(decision.delay_s, self._replaces)
        error = self._decider.give_up(failure)
        if not isinstance(error, ConfigError):
            self._printer.diagnosis(raised)
        return Stop(str(error))

    def _note_nccl(self, attempt: int) -> None:
        """Record what Ray's NCCL hang detector found in a failed attempt; files that can't be moved stay in place."""
        with contextlib.suppress(OSError):
            if files := self.nccl_findings(attempt):
                self._note(events.NcclHang(files))

    def _could_not_start(self, error: str) -> None:
        limit = self._config.failure.controller_failure_limit
        decision = f"failure.controller_failure_limit={limit} is used up: stopping"
        self._printer.failure(self._record.fail(STARTUP, None, error, decision))

    def _ready(self, ready: Ready, start: Start) -> None:
        """Compare the restored checkpoint with the last one saved, and print that training begins."""
        state, restored = self._record.state, self.group.restored
        name = restored.checkpoint if restored is not None else None
        # names begin with the step; the restored checkpoint may be newer than the last one reported
        saved = state.checkpoint
        if ready.source not in (REPLACED, MEMORY):
            if saved is not None and (name is None or name < saved) and saved not in self.group.rejected:
                self._note(events.CheckpointRejected(saved, "it is gone"))
            state.checkpoint = name  # a worker may have died after saving it, before reporting it
        if start is Start.RESIZED:
            self._note(events.Resized(state.world_sizes[-1]))
        self._printer.ready(ready, start)

    def _note(self, event: events.Event) -> None:
        """Record and print an event of the driver itself."""
        self._record.event(event)
        self.group.note(Happened(event))
        self._printer.event(event)

    @property
    def given_up(self) -> FtexpError | None:
        """The error that ends the run; None while it continues."""
        return self._decider.given_up

    def ray_lost(self, error: RayLostError) -> None:
        """Decide and record whether the run resumes with a new Ray; set `error.begins_again` accordingly."""
        error.begins_again = isinstance(self._failed(Cause(RAY, None, str(error), Ending.DIED)), Retry)

    def restart(self, config: Config, overrides: list[str]) -> Restart:
        """Return the state for a new interpreter, after `ray_lost` has decided to resume.

        config: the run's config with failure.recovery as configured; the new interpreter decides it again.
        """
        name, noticed_at = self._record.state.name, self._record.clock.noticed_at
        assert noticed_at is not None, "by what was decided upon"
        run = dataclasses.replace(config.run, name=name)
        config = dataclasses.replace(config, run=run, resume="auto")
        return Restart(config, overrides, self._decider.num_before, noticed_at, self._record.unwritten_failures)

    def stop(self, hub: Hub, asked: KeyboardInterrupt) -> bool:
        """Ask the workers to stop after a final checkpoint; return whether there are any."""
        self._asked = asked
        if not hub.broadcast(Stop()):
            return False
        self._terminal.say(
            f"stopping after a final checkpoint (up to {STOP_GRACE_S:.0f} s); press Ctrl-C again to stop immediately",
            "yellow",
        )
        return True

    def interrupted(self) -> KeyboardInterrupt:
        """Return the interrupt that asked the run to stop."""
        return self._asked
