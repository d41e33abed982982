"""The times at which checkpoints are due: every rank decides the same at the same step."""

from __future__ import annotations

import time
from collections.abc import Callable

from ftexp.config.schema import CheckpointConfig

_ASK_EVERY_S = 1.0  # about the longest delay until a request to stop is noticed
_SAVE, _STOP = 0, -1  # answers of rank 0; any other is the step of the next question


class Cadence:
    """Decides after each step whether to save. `agree(value)` returns rank 0's `value` on every rank; it is collective.

    Every rank counts the same steps and epochs. The clock and requests to stop or save are read on rank 0 only. The
    other ranks ask it as rarely as possible: each answer determines the step of the next question. `machine_goes()` is
    called at the same steps, and is collective: whether the preemption of a worker's machine has been newly announced.

    `reasons`: why a checkpoint is due, or waits for the previous one: every_steps, every_epochs, every_seconds,
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
        self.stopping = False  # the run is to stop after this checkpoint
        self.reasons: list[str] = []
        self._saved_step = self._asked_step = self._ask_at = -1
        self._saved_at = self._asked_at = clock()
        self._gap = 1  # steps from one question to the next

    def due(
        self, step: int, epoch: int, epoch_ended: bool, finished: bool, busy: bool, evaluated: bool = False
    ) -> bool:
        """Return whether to save after `step`; collective.

        busy: whether a checkpoint is in flight on rank 0; the next one waits for it.
        evaluated: whether this step is to be evaluated from its checkpoint.
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
        """Note that a checkpoint of `step` was started or restored."""
        self._saved_step = step
        self.resumed(step, 0.0)

    def resumed(self, step: int, saved_s_ago: float) -> None:
        """Note that training continues after `step`, `saved_s_ago` seconds after the last checkpoint."""
        self._asked_step, self._asked_at = step, self._clock()
        self._saved_at = self._asked_at - saved_s_ago
        self.reasons, self._ask_at, self._gap = [], step + 1, 1

    def rejoin(self, step: int) -> None:
        """Note that training continues after `step`, together with a rank that has just started."""
        self.resumed(step, self._clock() - self._saved_at)

    def stop(self) -> None:
        """Make the next call of `due` return True, for a last checkpoint; to be called on every rank."""
        self.stopping = True
        self._note("stop")

    def _note(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def _ask(self, step: int) -> None:
        """Note whether a checkpoint is due by rank 0's clock, a request or a preemption."""
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
            # half of the time left, since steps may get slower; at most twice the last gap, since the first estimates
            # may be far off
            answer = step + max(1, min(int(min(left / 2, _ASK_EVERY_S) / step_s), 2 * self._gap))
        answer = self._agree(answer)
        self._gap = answer - step
        self._ask_at, self._asked_step, self._asked_at = answer, step, now
        self.stopping = self.stopping or answer == _STOP
        if answer in (_SAVE, _STOP):
            self._note(reason)
        if self._machine_goes():
            self._note("preemption")
