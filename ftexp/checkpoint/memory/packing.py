"""Copying a tree of state into a slot, and rebuilding it from there."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftexp.checkpoint.memory.slot import PAGE, Header, Slot
from ftexp.checkpoint.sharding import Piece, is_sharded
from ftexp.checkpoint.staging import Staging, load_part
from ftexp.checkpoint.tree import Path, leaves, mapped

_ALIGNED = 64
_FACTS_BYTES = 1 << 12
_SPARE_BYTES = 1 << 16  # for an outline that grows


class SlotIsFullError(Exception):
    """A state no longer fits into its slot."""


def slot_bytes(state: Any) -> tuple[int, int]:
    """Return the minimum size of a slot for `state`, and the size of a new one, with reserves."""
    tensors = [leaf.to_local() if is_sharded(leaf) else leaf for _, leaf in leaves(state) if isinstance(leaf, Tensor)]
    data = sum(_aligned(tensor.nbytes) for tensor in tensors)
    rest = mapped(state, lambda leaf, _: None if isinstance(leaf, Tensor) else leaf)
    described = [(0, str(tensor.dtype), tuple(tensor.shape), tensor.stride(), 0, ()) for tensor in tensors]
    outline = len(_saved({"tree": rest, "tensors": described}))
    needed = PAGE + data + outline + _FACTS_BYTES
    return needed, needed + outline + _SPARE_BYTES


class SlotCopier:
    """Copies states into one slot; tensors of unchanged shape reuse their memory."""

    def __init__(self, slot: Slot, device: torch.device) -> None:
        self.slot, self._device = slot, device
        self._memory = torch.frombuffer(slot.data, dtype=torch.uint8)
        self._begin()

    def _begin(self) -> None:
        self._end = 0
        self._staging = Staging(self._device, self._room_for)

    def copy(self, state: Any) -> Any:
        """Return a copy of `state` whose tensors are in the slot; SlotIsFullError if they don't fit."""
        self.slot.clear()
        try:
            return self._staging.copy(state)
        except SlotIsFullError:
            self._begin()  # shapes have changed: lay the slot out again
            return self._staging.copy(state)

    def _room_for(self, tensor: Tensor) -> Tensor:
        begin, self._end = self._end, self._end + _aligned(tensor.nbytes)
        if self._end > len(self._memory):
            raise SlotIsFullError
        stride = torch.empty_like(tensor, device="meta").stride()
        return self._memory[begin : begin + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, stride)

    def outline(self, copied: Any) -> tuple[int, bytes]:
        """Return the number of data bytes, and the outline of what `copy` returned."""
        base, tensors = self._memory.data_ptr(), dict[int, Any]()
        for number, (_, leaf) in enumerate(leaves(copied)):
            if isinstance(leaf, (Tensor, Piece)):
                rows, first, whole = (leaf.rows, leaf.first, leaf.shape) if isinstance(leaf, Piece) else (leaf, -1, ())
                place = (rows.data_ptr() - base if rows.numel() else 0, str(rows.dtype), tuple(rows.shape))
                tensors[number] = (*place, rows.stride(), first, tuple(whole))
        rest = mapped(copied, lambda leaf, _: None if isinstance(leaf, (Tensor, Piece)) else leaf)
        return self._end, _saved({"tree": rest, "tensors": tensors})


def unpacked(slot: Slot, header: Header) -> Any:
    """Return the state in a verified slot; its tensors stay there. CheckpointError if it isn't plain data."""
    outline = load_part("a snapshot's outline", slot.outline(header))
    memory, tensors, numbers = slot.data, outline["tensors"], iter(range(1 << 62))

    def fill(leaf: Any, _: Path) -> Any:
        if (number := next(numbers)) not in tensors:
            return leaf
        offset, dtype, shape, stride, first, whole = tensors[number]
        rows = _tensor(memory, _Place(offset, getattr(torch, dtype.removeprefix("torch.")), shape, stride))
        return rows if first < 0 else Piece(rows, first, whole)

    return mapped(outline["tree"], fill)


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(memory: memoryview, place: _Place) -> Tensor:
    if not (count := math.prod(place.shape)):
        return torch.empty(place.shape, dtype=place.dtype)
    held = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset)
    return held.as_strided(place.shape, place.stride)


def merged(trees: list[Any]) -> Any:
    """Merge the trees of all shards into one with whole tensors; other leaves come from the first tree."""
    pieces: dict[Path, list[Piece]] = {}
    for tree in trees:
        for path, leaf in leaves(tree):
            if isinstance(leaf, Piece):
                pieces.setdefault(path, []).append(leaf)

    def whole(leaf: Any, path: Path) -> Any:
        if not isinstance(leaf, Piece):
            return leaf
        found = sorted(pieces[path], key=lambda piece: piece.first)
        return torch.cat([piece.rows for piece in found if piece.rows.numel()]) if leaf.shape[0] else leaf.rows

    return mapped(trees[0], whole)


def own(tree: Any) -> Any:
    """Return a copy of a tree with tensors in this process's own memory."""

    def copy(leaf: Any, _: Path) -> Any:
        if isinstance(leaf, Piece):
            return Piece(leaf.rows.clone(), leaf.first, leaf.shape)
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return mapped(tree, copy)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
