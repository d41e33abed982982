"""Handling of a batch with a NaN or infinite gradient. It is summed over ranks, so all ranks decide the same."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from torch import Tensor

from ftexp.config.schema import FailureConfig
from ftexp.counting import counted
from ftexp.data.batches import Batch
from ftexp.errors import NonFiniteError
from ftexp.job.skipped_batches import Range, SkippedBatches
from ftexp.wire import events
from ftexp.wire.messages import Happened

if TYPE_CHECKING:
    from ftexp.checkpoint.manager import CheckpointManager
    from ftexp.evaluation.meter import Meter
    from ftexp.job.group import ProcessGroup
    from ftexp.job.learner import Learner
    from ftexp.job.progress import Progress
    from ftexp.wire.channel import Channel


def before_step(learner: Learner, meter: Meter) -> list[Tensor]:
    """Return the state for `put_back`: the meter's sums, and the model's buffers, which a forward pass may change."""
    return [meter.taken(), *(buffer.clone() for buffer in learner.model.buffers())]


def put_back(learner: Learner, meter: Meter, before: list[Tensor]) -> None:
    """Undo a step whose gradient is not to be applied."""
    learner.optimizer.zero_grad(set_to_none=True)
    meter.put_back(before[0])
    for buffer, value in zip(learner.model.buffers(), before[1:], strict=True):
        buffer.copy_(value)


class NonFiniteRecovery:
    """Skips batches with a non-finite gradient, or rolls back, as `failure.on_nonfinite` says.

    `num_skipped`: number of skipped steps in a row.
    """

    def __init__(
        self,
        config: FailureConfig,
        group: ProcessGroup,
        progress: Progress,
        skipped: SkippedBatches,
        channel: Channel,
        checkpoints: CheckpointManager,
    ) -> None:
        self._config, self._group, self._progress = config, group, progress
        self._skipped, self._channel, self._checkpoints = skipped, channel, checkpoints
        self.num_skipped = 0

    def skips(self, batch: Batch) -> bool:
        """Return whether the batch is among those to skip; if so, count the skipped step."""
        covered = self._skipped.cover(batch.start)
        if covered:
            self.num_skipped += 1
        return covered

    def recovered(self) -> None:
        """Reset `num_skipped`: a step was taken."""
        self.num_skipped = 0

    def recover(self, batch: Batch) -> bool:
        """Skip a batch whose gradient was not finite, or roll back; return True after a rollback.

        Later attempts skip the batch too. NonFiniteError if this has happened too often.
        """
        if self._config.on_nonfinite == "rollback":
            self._roll_back(batch)
            return True
        self._skip(batch)
        return False

    def _skip(self, batch: Batch) -> None:
        step, limit = self._progress.step + 1, self._config.max_nonfinite_steps
        self.num_skipped += 1
        if self.num_skipped > limit:
            raise NonFiniteError(
                f"{counted(self.num_skipped, 'step')} in a row had a gradient that is not finite, the last of them "
                f"step {step}, and failure.max_nonfinite_steps={limit}"
            )
        positions = (batch.start, batch.end)
        self._leave_out(positions, events.StepSkipped([*positions], step, "the gradient is not finite"))

    def _roll_back(self, batch: Batch) -> None:
        """Roll back to the copy of the last checkpoint in memory, and skip the batches that led to the bad gradient."""
        step, limit = self._progress.step + 1, self._config.max_rollbacks
        if self._checkpoints.num_rollbacks >= limit:
            raise NonFiniteError(
                f"the gradient of step {step} is not finite, and the rollbacks to the same checkpoint are used up: "
                f"failure.max_rollbacks={limit}"
            )
        self._checkpoints.roll_back()
        left_out = self._skipped.widened(batch.start, batch.end, self._progress.position)
        self._leave_out(left_out, events.RolledBack([*left_out], step, self._progress.step))

    def _leave_out(self, positions: Range, event: events.Event) -> None:
        """Skip the batches at `positions`. Recorded before training continues, so that later attempts skip them too."""
        self._skipped.add(positions)
        if self._group.rank == 0:
            self._channel.send(Happened(event))
            with contextlib.suppress(OSError):  # if this can't be recorded, a later attempt checks the batch again
                self._channel.sync()
