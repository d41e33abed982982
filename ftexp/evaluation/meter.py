"""Running sums that are the same however often a run was interrupted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Losses are summed as integer multiples of 2**-24. Such sums don't depend on the order of addition, so a run that was
# resumed or resized reports bitwise the same numbers as an undisturbed run.
_UNIT = 2.0**24
# A sum is stored in 32-bit digits, the lowest first. Any float32 loss has 5 digits, and an int64 per digit has room for
# the sum over 2**31 samples.
_BITS, _NUM_DIGITS = 32, 5


class Meter:
    """Sums of losses, right predictions and samples since the last reset, on the device and without synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(_NUM_DIGITS + 3, dtype=torch.int64, device=device)
        self._of_ranks: Tensor | None = None  # [ranks, sums] at the last `share`
        self._scales = 2.0 ** (_BITS * torch.arange(_NUM_DIGITS, dtype=torch.float64, device=device))

    def add(self, losses: Tensor, correct: Tensor, counted: Tensor) -> None:
        """Count samples: losses float [rows], correct bool [rows]; rows where `counted` is False are excluded."""
        finite = torch.isfinite(losses.float())
        units = (torch.where(counted & finite, losses.detach(), 0).double() * _UNIT).round()
        digits = (units[:, None] / self._scales).trunc().fmod(2.0**_BITS).long()  # exact, with the sign of the loss
        lost = (counted & ~finite).sum()
        self._sums += torch.stack([*digits.sum(0), (correct & counted).sum(), counted.sum(), lost])

    def taken(self) -> Tensor:
        """Return a copy of the sums, for `put_back`."""
        return self._sums.clone()

    def put_back(self, sums: Tensor) -> None:
        """Restore the sums that `taken` returned."""
        self._sums.copy_(sums)

    def reset(self) -> None:
        """Set all sums to 0."""
        self._sums.zero_()
        self._of_ranks = None

    def share(self) -> None:
        """Send every rank's sums to all ranks, so that they survive the loss of a process; collective."""
        found = [torch.empty_like(self._sums) for _ in range(dist.get_world_size())]
        dist.all_gather(found, self._sums)
        self._of_ranks = torch.stack(found)

    def shared(self, rank: int) -> Tensor:
        """Return the sums of `rank` at the last `share` since the last reset; zeros if there was none."""
        return torch.zeros_like(self._sums) if self._of_ranks is None else self._of_ranks[rank]

    def totals(self) -> list[int]:
        """Return sums over all ranks: loss in units of 2**-24, right predictions, samples, samples of non-finite loss.

        Collective.
        """
        return self.totals_with([])[0]

    def totals_with(self, others: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return `totals`, and the sums of `others` over ranks; one collective for both."""
        totals = torch.cat([self._sums, torch.tensor(others, dtype=torch.int64, device=self._sums.device)])
        if dist.is_initialized():
            dist.all_reduce(totals)
        sums = [int(value) for value in totals.tolist()]
        own, summed = sums[: len(self._sums)], sums[len(self._sums) :]
        loss = sum(digit << _BITS * place for place, digit in enumerate(own[:_NUM_DIGITS]))
        return [loss, *own[_NUM_DIGITS:]], summed

    def restore(self, totals: list[int], rank: int) -> None:
        """Restore the result of `totals`: rank 0 gets the sums of all ranks, the others get 0."""
        self.reset()
        if rank == 0:
            loss, *others = totals
            sums = [*_digits(loss), *others]
            self._sums += torch.tensor(sums, dtype=torch.int64, device=self._sums.device)


def _digits(loss: int) -> list[int]:
    """Return the digits of a sum of losses; the last digit is not limited to 32 bits."""
    digits = [loss >> _BITS * place & 2**_BITS - 1 for place in range(_NUM_DIGITS - 1)]
    return [*digits, loss >> _BITS * (_NUM_DIGITS - 1)]


def means(totals: list[int]) -> tuple[float, float]:
    """Return (mean loss, accuracy) for a result of `Meter.totals`.

    Both are NaN if there are no samples; the loss is NaN if a sample's loss is not finite.
    """
    loss, correct, count, non_finite = totals
    if count == 0:
        return float("nan"), float("nan")
    return float("nan") if non_finite else loss / _UNIT / count, correct / count
