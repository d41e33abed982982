"""Helpers for models and tensors that may be sharded. Detected by their methods: importing FSDP2 takes time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 has sharded a module."""
    return hasattr(model, "reshard") and hasattr(model, "unshard")


def reshard(model: nn.Module) -> None:
    """Free parameters gathered by a forward pass without a backward pass, so that the next pass gathers new values."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, without a copy; the tensor itself if it isn't sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; collective if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def rows_of(num_rows: int, index: int, count: int) -> range:
    """Return the rows in part number `index` of `count`, cut as by FSDP2 and torch.chunk."""
    size = -(-num_rows // count)
    return range(min(index * size, num_rows), min((index + 1) * size, num_rows))


def cut(tensor: Tensor, count: int, index: int) -> Tensor:
    """Return part number `index` of `count` of a whole tensor's rows, as a view."""
    rows = rows_of(len(tensor), index, count)
    return tensor[rows.start : rows.stop]


def like(value: Tensor, other: Any) -> Tensor:
    """Return a copy of a whole tensor, sharded as `other` is; `value` itself if `other` isn't sharded."""
    if not hasattr(other, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    mesh, placements = other.device_mesh, other.placements
    (dim,) = (dim for dim, placement in enumerate(placements) if placement.is_shard())
    rows = cut(value, mesh.size(dim), mesh.get_local_rank(dim)).to(local(other).device, copy=True)
    sharded: Tensor = type(other.data).from_local(
        rows, mesh, placements, run_check=False, shape=other.shape, stride=other.stride()
    )
    return sharded


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Load a state dict of whole tensors; a sharded model loads this rank's part of them."""
    own = model.state_dict()
    model.load_state_dict({name: like(value, own.get(name)) for name, value in weights.items()}, strict=strict)
