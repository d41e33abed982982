"""Bitwise comparison of two checkpoints."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch

from ftexp.checkpoint.manifest import FILES, Manifest
from ftexp.checkpoint.reading import read_parts
from ftexp.checkpoint.store import CheckpointStore


def load(store: CheckpointStore, manifest: Manifest) -> dict[str, Any]:
    """Return a checkpoint's content, {file name: tree}; CheckpointError if it doesn't verify."""
    return read_parts(store, manifest, FILES)


def tree_differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """Yield a line for each place where two trees of tensors and plain values are not bitwise identical."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        yield from _tensor_differences(first, second, where)
    elif isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(key for key in second if key not in first)]:
            place = f"{where}/{key}" if where else str(key)
            if key not in first or key not in second:
                yield f"{place} is in the {'first' if key in first else 'second'} only"
            else:
                yield from tree_differences(first[key], second[key], place)
    elif isinstance(first, (list, tuple)) and type(first) is type(second):
        if len(first) != len(second):
            yield f"{where} has {len(first)} entries in the first, {len(second)} in the second"
        for number, (one, other) in enumerate(zip(first, second, strict=False)):
            yield from tree_differences(one, other, f"{where}/{number}")
    elif type(first) is not type(second) or _bits(first) != _bits(second):
        yield f"{where}: {first!r} in the first, {second!r} in the second"


def _tensor_differences(first: torch.Tensor, second: torch.Tensor, where: str) -> Iterator[str]:
    kinds = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (first, second)]
    if kinds[0] != kinds[1]:
        yield f"{where}: {kinds[0]} in the first, {kinds[1]} in the second"
        return
    # compares bytes, not values: NaN doesn't equal NaN, and 0.0 equals -0.0
    differing = first.contiguous().view(-1).view(torch.uint8) != second.contiguous().view(-1).view(torch.uint8)
    if not differing.any():
        return
    elements = differing.view(first.numel(), -1).any(1)
    largest = (first.double() - second.double()).abs().max().item()
    yield f"{where}: {int(elements.sum())} of {first.numel()} values differ, by up to {largest:.3g}"


def _bits(value: Any) -> Any:
    return struct.pack("<d", value) if isinstance(value, float) else value
