"""What the driver makes of what workers and controller say: records, lines on the terminal, and decisions."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from typing import Any

from ftexp.cluster.interruptible import STOP_GRACE_S
from ftexp.config.schema import Config
from ftexp.driver.restart import Restart
from ftexp.driver.terminal import Terminal
from ftexp.errors import RayLostError
from ftexp.failure.causes import CONFIG, CRASH, RAY, STARTUP, Cause, as_death, as_hang, as_preemption, find_cause
from ftexp.failure.policy import Decision, Past, decide
from ftexp.rundir.record import RunRecord
from ftexp.trackers.follower import FAILED_EVENT, OPENED_EVENT, described
from ftexp.wire.hub import STOP, Hub, Message

_MOST_SAMPLES_SHOWN = 32
_CONTROLLER_DIED = "Ray Train's controller died, and its workers with it"


class Supervisor:
    """Turns what workers and controller say into records and lines on the terminal."""

    def __init__(
        self,
        record: RunRecord,
        terminal: Terminal,
        config: Config,
        num_before: int | None = None,
        no_new_ray: str | None = None,
    ) -> None:
        self._record, self._terminal, self._config = record, terminal, config
        # failures of earlier calls, which had budgets of their own; a new Ray in the middle of this one begins none
        self._num_before = len(record.state.failures) if num_before is None else num_before
        self._no_new_ray = no_new_ray  # why there can't be one, whatever the budget
        self._hung: dict[int, str] = {}  # rank -> what it was doing, of this attempt
        self._leaving: list[int] = []  # ranks whose machines were announced to be taken away
        self._has_failed = num_before is not None  # since the last worker group began to train
        self._has_trained = False  # in this call
        self._raised: Message | None = None  # the first of this attempt
        self._waiting_since: float | None = time.monotonic()  # while there is no worker group
        self._waiting_for: str | None = None
        self._asked = KeyboardInterrupt()
        self.stopped: str | None = None  # why no further try was made
        self.is_config_wrong = False  # that is why
        self._restored: dict[str, Any] = {}
        self._rejected: list[str] = []
        self._problem: str | None = None

    def handle(self, message: Message) -> Message | None:
        """The hub's handler: one message at a time."""
        kind = message["kind"]
        if kind == "failure":
            return self._failed(as_death(Cause(**message["cause"]), self._record.died_rank))
        if kind == "waiting":
            self._waiting(message["reason"])
            return None
        if kind == "advice_failed":
            self._record.event("advice_failed", error=message["error"])
            self._terminal.say(f"! {message['error']}; the run does without", "yellow")
            return None
        if kind == "resize_expected":
            self._resize_expected(message["num_workers"])
            return None
        if kind == "controller_died":  # as for a worker's failure; the driver itself has to fit again
            return self._failed(Cause(CRASH, None, _CONTROLLER_DIED, died=True))
        if kind == "could_not_start":  # before any worker group began to train, Ray Train gave up
            self._could_not_start(message["error"])
            return None
        if kind == "lost" and self._record.is_of_the_past(message):
            return None
        if kind == "hello" and self.stopped is not None:  # Ray's controller didn't wait for that answer
            return {"stop": self.stopped}
        if kind == "hello" and self._leaving and "stop" in (decided := self._taken_away()):
            return decided
        if kind == "kill_driver":  # chaos
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "raised" and self._raised is None:
            self._raised = message
        elif kind == "hung":
            self._hung[message["rank"]] = (
                f"{message['doing']} for {message['seconds']:.0f} s; stacks in {message['file']}"
            )
        answer = self._record.handle(message)
        if self._record.problem != self._problem and (problem := self._record.problem) is not None:
            self._terminal.say(f"! the run's records can't be written: {problem}; trying again", "yellow")
        self._problem = self._record.problem
        if kind == "hello" and message["rank"] == 0:
            self._restored, self._rejected = {}, []
            self._waiting_since = self._waiting_for = None
        elif kind == "lost" and self._waiting_since is None:
            self._waiting_since = time.monotonic()
        elif kind == "ready":
            self._ready(message)
        elif kind == "tick":
            self._terminal.step(self._record.state)
        elif kind == "metrics" and message["split"] == "val":
            self._terminal.epoch(self._record.state)
        elif kind == "event":
            self._on_event(message)
        return answer

    def _taken_away(self) -> Message:
        """Decide and record, when a new group says hello: at the end that was announced, Ray asks no callback."""
        return self._failed(as_death(find_cause({}), self._record.died_rank), told_late=True)

    def ray_lost(self, error: RayLostError) -> None:
        """Decide and record whether the run begins again with a new Ray; `error` takes the answer along."""
        no_new_ray = Decision(False, f"{self._no_new_ray}: giving up", cause=RAY) if self._no_new_ray else None
        answer = self._failed(Cause(RAY, None, str(error), died=True), decision=no_new_ray)
        error.begins_again = "stop" not in answer

    def restart(self, overrides: list[str]) -> Restart:
        """What the command goes on with, in a new interpreter, once that is decided."""
        config, name, noticed_at = self._config, self._record.state.name, self._record.noticed_at
        assert noticed_at is not None, "by what was decided upon"
        run = dataclasses.replace(config.run, name=name)
        config = dataclasses.replace(config, run=run, resume="auto")
        return Restart(config, overrides, self._num_before, noticed_at)

    def _failed(self, cause: Cause, told_late: bool = False, decision: Decision | None = None) -> Message:
        """Decide and record; the answer tells the controller whether to stop, or how long to wait."""
        if self.stopped is not None:  # by workers that were told to stop
            return {"stop": self.stopped}
        state = self._record.state
        if cause.kind != RAY:
            cause = as_preemption(as_hang(cause, self._hung), self._leaving)
        self._hung, self._leaving, self._has_failed = {}, [], True
        self._waiting_since = self._waiting_since or time.monotonic()
        failures = state.failures[self._num_before :]
        past = [Past(failure.cause, failure.step, failure.error, failure.progressed) for failure in failures]
        progressed, accumulate_steps = self._record.has_progressed, self._accumulate_steps()
        share = math.ceil(self._config.train.global_batch_size / (state.world_sizes or [1])[-1])
        micro_batch = math.ceil(share / accumulate_steps)
        if decision is None:
            decision = decide(cause, state.step, progressed, past, self._config.failure, micro_batch)
        if decision.halves:
            state.accumulate_steps = 2 * accumulate_steps
        failure = self._record.fail(decision.cause, cause.rank, cause.error, decision.reason, told_late)
        self._terminal.failure(failure)
        raised, self._raised = self._raised, None
        if decision.goes_on:
            return {"delay_s": decision.delay_s}
        if decision.cause == CONFIG:
            self.stopped, self.is_config_wrong = cause.error, True
            return {"stop": self.stopped}
        self._diagnose(raised)
        what = f"{failure.where} failed after step {failure.step} [{failure.cause}]"
        self.stopped = f"{what}: {failure.error}; {decision.reason}"
        return {"stop": self.stopped}

    def _accumulate_steps(self) -> int:
        return max(self._config.train.accumulate_steps, self._record.state.accumulate_steps or 1)

    @property
    def waiting_s(self) -> float:
        """For how long there has been no worker group, in seconds."""
        return time.monotonic() - self._waiting_since if self._waiting_since is not None else 0.0

    def _waiting(self, reason: str) -> None:
        if reason != self._waiting_for and self._waiting_since is not None:
            self._waiting_for = reason
            self._record.event("waiting", reason=reason)
            self._terminal.say(f"! no workers for {self.waiting_s:.0f} s: {reason}", "yellow")

    @property
    def world_size(self) -> int | None:
        """Of the workers that train; None while there are none."""
        return self._record.state.world_sizes[-1] if self._waiting_since is None else None

    def _resize_expected(self, num_workers: int) -> None:
        """There is room for more workers: Ray Train will stop those that train, without a word."""
        self._record.event("resize_expected", num_workers=num_workers)
        self._terminal.say(f"there is room for {num_workers} workers: saving until Ray Train starts them")

    def _could_not_start(self, error: str) -> None:
        limit = self._config.failure.controller_failure_limit
        decision = f"failure.controller_failure_limit={limit} is spent: giving up"
        self._terminal.failure(self._record.fail(STARTUP, None, error, decision))

    def _diagnose(self, raised: Message | None) -> None:
        """Print what helps to find out why a run was given up."""
        name = self._record.state.name
        if raised is not None:
            samples = ", ".join(map(str, raised["samples"][:_MOST_SAMPLES_SHOWN]))
            more = len(raised["samples"]) - _MOST_SAMPLES_SHOWN
            self._terminal.say(
                f"  rank {raised['rank']} was at step {raised['step']}, position {raised['position']:,}, with samples "
                f"{samples or 'none'}{f' and {more} more' if more > 0 else ''}; its traceback is in events.jsonl"
            )
        self._terminal.say(
            f"  once that is put right, the same command with run.name={name} goes on from the last save"
        )

    def stop(self, hub: Hub, asked: KeyboardInterrupt) -> bool:
        """Ask the workers to end after a last save; whether there are any."""
        self._asked = asked
        if not hub.tell(STOP):
            return False
        self._terminal.say(
            f"stopping after a last save, {STOP_GRACE_S:.0f} s at most; once more stops at once", "yellow"
        )
        return True

    def interrupted(self) -> KeyboardInterrupt:
        """What asked the run to stop."""
        return self._asked

    def _ready(self, message: Message) -> None:
        state, train = self._record.state, self._config.train
        self._note_missing(self._restored.get("checkpoint"))
        pids = self._record.pids()
        recovered, self._has_failed = self._has_failed, False
        resized, self._has_trained = self._has_trained and not recovered, True
        if resized:
            self._record.event("resized", world_size=state.world_sizes[-1])
            self._terminal.say(f"resized  to {state.world_sizes[-1]} workers, from step {message['step']}", "green")
        elif recovered:
            self._terminal.recovered(state.failures[-1], self._restored.get("checkpoint"), len(self._rejected), pids)
        elif self._restored:
            name = self._restored["checkpoint"]
            self._terminal.say(f"{'resumed':<9}at step {message['step']} from {name}")
        if message["weights"] and message["step"] == 0:
            self._terminal.say(f"{'weights':<9}{message['weights']}")
        self._terminal.ready(
            state, message["total_steps"], train.global_batch_size, train.epochs, pids, message["device"]
        )

    def _on_event(self, message: Message) -> None:
        if message["name"] == "restored":
            self._restored = message
        elif message["name"] == "checkpoint_rejected":
            self._rejected.append(message["checkpoint"])
            self._terminal.say(f"! checkpoint {message['checkpoint']} doesn't count: {message['reason']}", "yellow")
        elif message["name"] == "preemption_notice":
            self._leaving = message["ranks"]
            ranks = ", ".join(map(str, message["ranks"]))
            self._terminal.say(f"! the machine of rank {ranks} is about to be taken away: saving now", "yellow")
        elif message["name"] == "chaos":
            self._terminal.say(f"⚡ chaos: {message['fault']} after step {message['step']} on rank {message['rank']}")
        elif message["name"] == "step_skipped":
            self._terminal.say(f"! step {message['step']} left out: {message['reason']}", "yellow")
        elif message["name"] == "rolled_back":
            first, end = message["positions"]
            self._terminal.say(
                f"! the gradient of step {message['step']} is not finite: back to step {message['to_step']} in memory, "
                f"leaving out positions {first:,} to {end - 1:,}",
                "yellow",
            )
        elif message["name"] == "learning_rate_changed":
            self._terminal.say(
                f"! learning rate {message['after']:.3g} from step {message['step']}, {message['before']:.3g} in the "
                f"checkpoint: the schedule now spans train.epochs={self._config.train.epochs}",
                "yellow",
            )
        elif message["name"] == "slow_data":
            self._terminal.say(f"! rank {message['rank']}: {message['reason']}", "yellow")
        elif message["name"] == "bad_samples":
            for sample in message["samples"]:
                self._terminal.say(f"! left out, can't be read: {sample['where']}: {sample['reason']}", "yellow")
        elif message["name"] in (FAILED_EVENT, OPENED_EVENT):
            self._terminal.say(described(message), "yellow" if message["name"] == FAILED_EVENT else "")
        elif message["name"] == "profile_written":
            self._terminal.say(f"{'profile':<9}{message['where']} (chrome://tracing, or ui.perfetto.dev)")
        elif message["name"] == "profile_failed":
            self._terminal.say(f"! no profile: {message['error']}", "yellow")
        elif message["name"] == "report_failed":
            self._terminal.say(f"! the report will lack something: {message['error']}", "yellow")
        elif message["name"] == "checkpoint_failed":
            self._terminal.say(f"! checkpoint at step {message['step']} not written: {message['error']}", "yellow")

    def _note_missing(self, restored: str | None) -> None:
        """Tell of a checkpoint that was saved and is nowhere now."""
        state = self._record.state
        # names begin with the step: what is restored may well be newer than the last that was heard of
        if state.checkpoint is not None and (restored is None or restored < state.checkpoint):
            missing = {"checkpoint": state.checkpoint, "reason": "it is gone"}
            if state.checkpoint not in self._rejected:
                self._record.event("checkpoint_rejected", **missing)
                self._on_event({"name": "checkpoint_rejected", **missing})
        state.checkpoint = restored  # a worker that died after a save may not have told of it
