"""When a checkpoint is due. Every rank comes to the same answer at the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

from ftexp.config.schema import CheckpointConfig

_ASK_EVERY_S = 1.0  # how late a request to stop is noticed
_SAVE, _STOP = 0, -1  # answers; any other is the step at which to ask again


class Cadence:
    """Decides after each step. `agree(value)` returns rank 0's `value` on every rank, and is collective.

    Every rank counts the same steps and epochs. The clock, and whether somebody wants the run to stop or to save, are
    rank 0's, and asked as seldom as will do: each answer says at which step to ask again. `machine_goes()`, whether one
    of the workers' machines has newly been announced to go away, is collective and asked at the same steps.

    `reasons` says why a checkpoint is due, or waits for the one before: every_steps, every_epochs, every_seconds,
    evaluation, requested, preemption, stop, end. Only rank 0 can distinguish every_seconds from requested.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        agree: Callable[[int], int],
        clock: Callable[[], float] = time.monotonic,
        stop_requested: Callable[[], bool] = lambda: False,
        machine_goes: Callable[[], bool] = lambda: False,
        save_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._agree, self._clock, self._stop_requested = config, agree, clock, stop_requested
        self._machine_goes, self._save_requested = machine_goes, save_requested
        self.stopping = False  # this checkpoint is the last: somebody wants the run to stop
        self.reasons: list[str] = []
        self._saved_step = self._asked_step = self._ask_at = -1
        self._saved_at = self._asked_at = clock()
        self._gap = 1  # steps from one question to the next

    def due(
        self, step: int, epoch: int, epoch_ended: bool, finished: bool, busy: bool, evaluated: bool = False
    ) -> bool:
        """Whether to save after `step`; collective.

        busy: rank 0 has a checkpoint in flight, for which the next waits.
        evaluated: this very step shall be evaluated from its checkpoint.
        """
        if finished:
            if step == self._saved_step:
                return False
            self._note("end")
            return True
        config = self._config
        if config.every_steps is not None and step % config.every_steps == 0:
            self._note("every_steps")
        if config.every_epochs is not None and epoch_ended and epoch % config.every_epochs == 0:
            self._note("every_epochs")
        if evaluated:
            self._note("evaluation")
        self._ask(step)
        if self.stopping or evaluated:
            return True
        if step == self._saved_step:
            self.reasons = []
        return bool(self.reasons) and not self._agree(int(busy))

    def saved(self, step: int) -> None:
        """A checkpoint of `step` was begun, or restored."""
        self._saved_step = step
        self.resumed(step, 0.0)

    def resumed(self, step: int, saved_s_ago: float) -> None:
        """Training continues after `step`, so long after the last checkpoint."""
        self._asked_step, self._asked_at = step, self._clock()
        self._saved_at = self._asked_at - saved_s_ago
        self.reasons, self._ask_at, self._gap = [], step + 1, 1

    def rejoin(self, step: int) -> None:
        """Training continues after `step` together with a rank that has begun just now."""
        self.resumed(step, self._clock() - self._saved_at)

    def stop(self) -> None:
        """Let the next answer be that a checkpoint is due, the last; to be called on every rank."""
        self.stopping = True
        self._note("stop")

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _ask(self, step: int) -> None:
        """Note whether a checkpoint is due by rank 0's clock, or because somebody wants it."""
        if step < self._ask_at:
            return
        now, every = self._clock(), self._config.every_seconds
        left = _ASK_EVERY_S if every is None else self._saved_at + every - now
        reason = "every_seconds"
        if self._asked_step < 0:  # nothing to estimate from yet
            self._asked_step = step
        if self._stop_requested():
            answer, reason = _STOP, "stop"
        elif self._save_requested():
            answer, reason = _SAVE, "requested"
        elif left <= 0:
            answer = _SAVE
        else:
            done = step - self._asked_step
            step_s = max((now - self._asked_at) / max(done, 1), 1e-6)
            # half of what is left, since steps may get slower, and twice as far as last time at most, since the
            # first estimates may be far off
            answer = step + max(1, min(int(min(left / 2, _ASK_EVERY_S) / step_s), 2 * self._gap))
        answer = self._agree(answer)
        self._gap = answer - step
        self._ask_at, self._asked_step, self._asked_at = answer, step, now
        self.stopping = self.stopping or answer == _STOP
        if answer in (_SAVE, _STOP):
            self._note(reason)
        if self._machine_goes():
            self._note("preemption")
