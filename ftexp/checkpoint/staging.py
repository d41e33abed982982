"""Copies of state on the CPU: made, checked, serialised and read back."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ftexp.checkpoint import tree
from ftexp.checkpoint.sharding import Guard, LivePiece, Piece, is_sharded, rows_held
from ftexp.checkpoint.tree import mapped
from ftexp.errors import CheckpointError
from ftexp.storage.directory import Writer


class Staging:
    """Copies state to the CPU into reused memory: new memory takes several times as long as the copy.

    room_for: returns memory for a tensor's first copy; None: it is allocated.
    """

    def __init__(self, device: torch.device, room_for: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self._pin, self._room_for = device.type == "cuda", room_for
        self._kept: dict[tree.Path, torch.Tensor] = {}  # by their path in the tree
        self._live: dict[tree.Path, LivePiece] = {}
        self._guard = Guard()

    def copy(self, value: Any) -> Any:
        """Return a deep copy that later steps don't change; it is valid until the next call.

        A sharded tensor becomes the `Piece` that this process holds.
        """
        copied = mapped(value, self._copy)
        if self._pin:  # waits for the copies
            torch.cuda.synchronize()
        return copied

    def defer(self, value: Any) -> Any:
        """Copy as `copy` does, but sharded tensors only when `settle` is called, if they aren't written by then.

        On a GPU they are copied at once, since its memory can't be written to a file.
        """
        self._live.clear()
        return self.copy(value) if self._pin else mapped(value, self._defer)

    def settle(self) -> None:
        """Copy the tensors of the last `defer` that aren't written yet, since they are about to change."""
        if not self._live:
            return
        with self._guard.lock:
            for path, piece in self._live.items():
                piece.settle(functools.partial(self._copy_tensor, path=path))
            self._live.clear()

    def _defer(self, leaf: Any, path: tree.Path) -> Any:
        if not is_sharded(leaf) or not (rows := leaf.to_local().detach()).is_contiguous():
            return self._copy(leaf, path)
        self._live[path] = LivePiece(rows, rows_held(leaf).start, tuple(leaf.shape), self._guard)
        return self._live[path]

    def _copy(self, leaf: Any, path: tree.Path) -> Any:
        if is_sharded(leaf):
            held = self._copy_tensor(leaf.to_local().detach(), path)
            return Piece(held, rows_held(leaf).start, tuple(leaf.shape))
        return self._copy_tensor(leaf.detach(), path) if isinstance(leaf, torch.Tensor) else leaf

    def _copy_tensor(self, tensor: torch.Tensor, path: tree.Path) -> torch.Tensor:
        kept = self._kept.get(path)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
            kept = self._kept[path] = self._new(tensor) if self._room_for is None else self._room_for(tensor)
        return kept.copy_(tensor, non_blocking=True)

    def _new(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=self._pin and tensor.is_cuda)


def writer(part: Any) -> Writer:
    """Return the function that writes one file of a checkpoint."""

    def write(stream: Any) -> None:
        # no CRC32 of the zip format: every byte is hashed already, and torch.load doesn't read the CRC
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(part, stream)
        finally:
            torch.serialization.set_crc32_options(before)

    return write


def load_part(name: str, content: bytes | Path) -> Any:
    """Read one file of a checkpoint onto the CPU without running code in it; CheckpointError if it has any.

    content: the file's bytes, or its path; with a path, tensors are mapped into memory.
    """
    source = content if isinstance(content, Path) else io.BytesIO(content)
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=source is content)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError or EOFError, by what is wrong
        raise CheckpointError(f"{name} can't be loaded as plain data: {error}") from error


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; of a sharded tensor, only this process's rows are checked."""
    tensor = tensor.to_local() if is_sharded(tensor) else tensor
    if not tensor.is_floating_point():
        return True
    # one pass and no copy: NaN and infinity survive a sum
    narrow = tensor.dtype in (torch.float16, torch.bfloat16)
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32 if narrow else tensor.dtype)))
