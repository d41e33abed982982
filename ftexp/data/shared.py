"""A value that many tasks read."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import ray

T = TypeVar("T")


class Shared(Generic[T]):
    """A value that many tasks read: stored once in the object store, and read there in place."""

    def __init__(self, value: T) -> None:
        self._ref = ray.put(value)
        self._here: T | None = None  # cached value, since `get` is called for every row

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_here": None}

    def get(self) -> T:
        """Return the value; its arrays are read-only."""
        if self._here is None:
            self._here = ray.get(self._ref)
        return self._here
