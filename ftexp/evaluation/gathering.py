"""Gathering of all ranks' values on rank 0."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(own: T) -> list[T]:
    """Return all ranks' values, in rank order, on rank 0, and only the own value on other ranks; collective."""
    if not dist.is_initialized():
        return [own]
    parts: list[T] | None = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, parts)
    return parts if parts is not None else [own]
