"""What happens to a batch whose gradient is NaN or infinite. The gradient is summed over ranks, so all decide alike."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ftexp.data.batches import Batch
from ftexp.errors import NonFiniteError
from ftexp.job.skipped_batches import Range

if TYPE_CHECKING:
    from ftexp.checkpoint.manager import CheckpointManager
    from ftexp.job.job import Job


def before_step(job: Job) -> list[Tensor]:
    """What `put_back` needs: the meter's sums, and the model's buffers, which batch norm changes in a forward pass."""
    return [job.progress.train.taken(), *(buffer.clone() for buffer in job.model.buffers())]


def put_back(job: Job, before: list[Tensor]) -> None:
    """Undo a step whose gradient shall not be applied."""
    job.optimizer.zero_grad(set_to_none=True)
    job.progress.train.put_back(before[0])
    for buffer, value in zip(job.model.buffers(), before[1:], strict=True):
        buffer.copy_(value)


def skip_step(job: Job, batch: Batch) -> None:
    """Leave out a batch whose gradient was not finite, now and in every later attempt; NonFiniteError if too many."""
    step, limit = job.progress.step + 1, job.config.failure.max_nonfinite_steps
    job.num_skipped += 1
    if job.num_skipped > limit:
        raise NonFiniteError(
            f"{job.num_skipped} steps in a row had a gradient that is not finite, the last of them step {step}, and "
            f"failure.max_nonfinite_steps={limit}"
        )
    _leave_out(job, (batch.start, batch.end), "step_skipped", step=step, reason="the gradient is not finite")


def roll_back(job: Job, batch: Batch, checkpoints: CheckpointManager) -> None:
    """Go back to the last save, in memory, and leave out a batch whose gradient was not finite.

    NonFiniteError if that has happened too often since that save.
    """
    step, limit = job.progress.step + 1, job.config.failure.max_rollbacks
    if job.num_rollbacks >= limit:
        raise NonFiniteError(
            f"the gradient of step {step} is not finite, and the rollbacks to the same save are spent: "
            f"failure.max_rollbacks={limit}"
        )
    checkpoints.roll_back()
    job.num_rollbacks += 1
    left_out = job.skips.widened(batch.start, batch.end, job.progress.position)
    _leave_out(job, left_out, "rolled_back", step=step, to_step=job.progress.step)


def _leave_out(job: Job, positions: Range, event: str, **fields: Any) -> None:
    """Have the batches at `positions` drive no update; on record before training goes on, so that it stays so."""
    job.skips.add(positions)
    if job.rank == 0:
        job.line.send("event", name=event, positions=list(positions), **fields)
        with contextlib.suppress(OSError):  # the records wait for a disk; without them another attempt looks again
            job.line.sync()
