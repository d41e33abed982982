"""The processes that train together, and their collectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ProcessGroup:
    """One rank of torch's default process group. Without a group, collectives return the process's own value."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_awaited(self) -> bool:
        """Whether this rank was restarted, and other ranks wait for it to form the group."""
        return self.world_size > 1 and not dist.is_initialized()

    def agree(self, value: int) -> int:
        """Return rank 0's `value` on every rank; collective."""
        if not dist.is_initialized():
            return value
        box = torch.tensor([value], device=self.device)
        dist.broadcast(box, src=0)
        return int(box.item())

    def all_agree(self, holds: bool) -> bool:
        """Return whether it holds on every rank; collective."""
        return bool(self.lowest(int(holds)))

    def lowest(self, value: int) -> int:
        """Return the lowest `value` of any rank; collective."""
        if not dist.is_initialized():
            return value
        box = torch.tensor([value], device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box.item())

    def any_of(self, value: str | None) -> str | None:
        """Return the text of the lowest rank that has one; None if no rank has; collective."""
        return next((text for text in self.gather(value) if text is not None), None)

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's value, of any type that pickles, on every rank; collective."""
        if not dist.is_initialized():
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def agree_on(self, value: Any) -> Any:
        """Return rank 0's `value`, of any type that pickles, on every rank; collective."""
        if not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
