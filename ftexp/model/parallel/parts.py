"""Models and tensors of which this rank may hold a part. Known by their methods: importing FSDP2 takes time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether a module is one of FSDP2's."""
    return hasattr(model, "reshard") and hasattr(model, "unshard")


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered: the next must gather what is new by then."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; all of one that isn't sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; collective if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def rows_of(num_rows: int, index: int, count: int) -> range:
    """Return which rows are in part number `index` of `count`, as FSDP2 cuts, and torch.chunk."""
    size = -(-num_rows // count)
    return range(min(index * size, num_rows), min((index + 1) * size, num_rows))


def cut(tensor: Tensor, count: int, index: int) -> Tensor:
    """Return part number `index` of `count` of a whole tensor's rows, a view."""
    rows = rows_of(len(tensor), index, count)
    return tensor[rows.start : rows.stop]


def like(value: Tensor, other: Any) -> Tensor:
    """Return a whole tensor as `other` lies on the ranks, a copy; as it is if that isn't sharded."""
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
    """Load a state dict of whole tensors, of which a sharded model takes this rank's part."""
    own = model.state_dict()
    model.load_state_dict({name: like(value, own.get(name)) for name, value in weights.items()}, strict=strict)
