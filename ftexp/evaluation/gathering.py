"""Bringing what every rank found to rank 0."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(own: T) -> list[T]:
    """Return what all ranks have, in their order, on rank 0, and a rank's own alone on the others; collective."""
    if not dist.is_initialized():
        return [own]
    parts: list[T] | None = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts)
    return parts if parts is not None else [own]
