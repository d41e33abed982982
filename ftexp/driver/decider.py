"""Decisions about failures: passes what is known of a failure, and the history, to ftexp.failure.policy."""

from __future__ import annotations

import math

from ftexp.config.schema import Config
from ftexp.errors import ConfigError, FtexpError, RunFailedError
from ftexp.failure.causes import CONFIG, RAY, Cause, as_hang, as_preemption
from ftexp.failure.policy import Action, Decision, Past, decide
from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import Failure
from ftexp.wire import events
from ftexp.wire.messages import Happened, Hung, Message


class Decider:
    """Decides what happens after each failure of an invocation.

    Args:
        record: records of the run; its state holds the failures of all invocations.
        config: config of the run, with failure.recovery resolved.
        num_before: number of failures in earlier invocations, which aren't charged to the budgets; None: all so far.
            It is set after a restart with a new Ray, which continues the invocation.
        no_new_ray: why a dead Ray can't be replaced; None if it can.
    """

    def __init__(self, record: RunRecord, config: Config, num_before: int | None, no_new_ray: str | None) -> None:
        self._record, self._config, self._no_new_ray = record, config, no_new_ray
        self.num_before = len(record.state.failures) if num_before is None else num_before
        self._hung: dict[int, Hung] = {}  # hangs of this attempt, by rank
        self.leaving: list[int] = []  # ranks with an announced preemption
        self.given_up: FtexpError | None = None  # error that ends the run

    def note(self, message: Message) -> None:
        """Note a hang or the notice of a preemption: each precedes a failure."""
        match message:
            case Hung():
                self._hung[message.rank] = message
            case Happened(events.PreemptionNotice(ranks=ranks)):
                self.leaving = ranks

    def decide(self, cause: Cause, others_wait: bool) -> tuple[Cause, Decision]:
        """Return the cause, refined by earlier messages, and the decision.

        others_wait: see `ftexp.failure.policy.decide`.
        """
        if cause.kind != RAY:
            cause = as_preemption(as_hang(cause, self._hung), self.leaving)
        self._hung, self.leaving = {}, []
        if cause.kind == RAY and self._no_new_ray is not None:
            return cause, Decision(Action.STOP, f"{self._no_new_ray}: stopping", RAY)
        state, accumulate_steps = self._record.state, self._accumulate_steps()
        failures = state.failures[self.num_before :]
        past = [Past(failure.cause, failure.step, failure.error, failure.progressed) for failure in failures]
        share = math.ceil(self._config.train.global_batch_size / (state.world_sizes or [1])[-1])
        micro_batch, progressed = math.ceil(share / accumulate_steps), self._record.clock.has_progressed
        decision = decide(cause, state.step, progressed, past, self._config.failure, micro_batch, others_wait)
        if decision.action is Action.RESTART_SMALLER_MICRO_BATCHES:
            state.accumulate_steps = 2 * accumulate_steps
        return cause, decision

    def give_up(self, failure: Failure) -> FtexpError:
        """Give the run up after a recorded failure; return the error that ends it."""
        if failure.cause == CONFIG:
            self.given_up = ConfigError(failure.error)
        else:
            what = f"{failure.where} failed after step {failure.step} [{failure.cause}]"
            self.given_up = RunFailedError(f"{what}: {failure.error}; {failure.decision}")
        return self.given_up

    def _accumulate_steps(self) -> int:
        return max(self._config.train.accumulate_steps, self._record.state.accumulate_steps or 1)
