"""Which process holds which rows of a sharded tensor; conversion between DTensors and their local rows.

Tensors are sharded by rows (their first dimension), into one shard for each process of a replica, as by `torch.chunk`
and FSDP2: all shards have the same number of rows, but the last ones may have fewer or none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ftexp.checkpoint.slices import Slice
from ftexp.checkpoint.tree import Path, leaf_at, leaves, mapped
from ftexp.errors import CheckpointError
from ftexp.model.parallel.parts import rows_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}
# path and shape of a saved tensor -> the DTensor that will load it, or None
Like = Callable[[Path, tuple[int, ...]], Any]


def overlaps(num_rows: int, rows: range, num_shards: int) -> Iterator[tuple[int, range]]:
    """Yield (shard, its part of `rows`) for each of `num_shards` shards that holds some of them."""
    if not rows:
        return
    size = len(rows_of(num_rows, 0, num_shards))
    for shard in range(rows.start // size, (rows.stop - 1) // size + 1):
        held = rows_of(num_rows, shard, num_shards)
        yield shard, range(max(rows.start, held.start), min(rows.stop, held.stop))


@dataclass(frozen=True)
class Place:
    """Position of a process among the processes that share sharded tensors."""

    shard: int
    num_shards: int
    is_first_replica: bool  # only its processes write
    dims: dict[str, int]  # sizes of the device mesh, by name


@dataclass(eq=False)
class Piece:
    """The rows of a tensor that a process holds: a copy."""

    rows: Tensor
    first: int  # index of its first row in the whole tensor
    shape: tuple[int, ...]  # shape of the whole tensor

    def with_rows(self, use: Callable[[Tensor], Any]) -> Any:
        """Return `use(rows)`; the rows don't change meanwhile."""
        return use(self.rows)

    def reader(self) -> Callable[[int, int], memoryview]:
        """Return a function that reads bytes [begin, end) of the rows; the result is valid until its next call."""
        data = bytes_of(self.rows.contiguous())
        return lambda begin, end: data[begin:end]

    def written(self) -> None:
        """Note that the rows have been written."""


class Guard:
    """Lock that is held while live rows are read, or copied because training is about to change them."""

    def __init__(self) -> None:
        self.lock, self._scratch = threading.Lock(), bytearray()

    def scratch(self, num_bytes: int) -> memoryview:
        """Return memory that is valid until the next call."""
        if len(self._scratch) < num_bytes:
            self._scratch = bytearray(num_bytes)
        return memoryview(self._scratch)[:num_bytes]


class LivePiece(Piece):
    """Contiguous rows that training updates; training waits for a reader only while it copies one chunk."""

    def __init__(self, rows: Tensor, first: int, shape: tuple[int, ...], guard: Guard) -> None:
        super().__init__(rows, first, shape)
        self._guard, self._is_live, self._is_written, self._is_gone = guard, True, False, False

    def with_rows(self, use: Callable[[Tensor], Any]) -> Any:
        """Return `use(rows)`; training waits meanwhile."""
        with self._guard.lock:
            return use(self.rows)

    def reader(self) -> Callable[[int, int], memoryview]:
        """As of `Piece`; CheckpointError if the rows have changed since they were written."""
        if self._is_gone:
            raise CheckpointError("these rows were written once already, and training has changed them since")
        return self._read

    def _read(self, begin: int, end: int) -> memoryview:
        with self._guard.lock:
            data = bytes_of(self.rows)[begin:end]
            if not self._is_live:
                return data
            copied = self._guard.scratch(end - begin)
            copied[:] = data
        return copied

    def written(self) -> None:
        """Note that the rows no longer need a copy."""
        with self._guard.lock:
            self._is_written = True

    def settle(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Copy the rows, which are about to change, unless they have been written; the caller holds the lock."""
        if not self._is_written:
            self.rows = copy(self.rows)
        self._is_live, self._is_gone = False, self._is_written


def is_sharded(leaf: Any) -> TypeGuard[DTensor]:
    """Return whether a leaf is a DTensor, by its methods: runs without DTensors skip the slow import of the class."""
    return isinstance(leaf, Tensor) and hasattr(leaf, "full_tensor")


def place_of(tensor: DTensor) -> Place:
    """Return this process's place; CheckpointError if the tensor isn't sharded by rows along one mesh dimension."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    sharded = [number for number, each in enumerate(placements) if isinstance(each, Shard)]
    rest = [each for number, each in enumerate(placements) if number not in sharded]
    by_rows = len(sharded) == 1 and placements[sharded[0]] == Shard(0) and all(isinstance(r, Replicate) for r in rest)
    if not by_rows or coordinate is None:
        raise CheckpointError(f"checkpoint.format=sharded saves tensors that are cut by rows once, not {placements}")
    number = sharded[0]
    names = mesh.mesh_dim_names or tuple(f"dim_{each}" for each in range(mesh.ndim))
    return Place(
        shard=coordinate[number],
        num_shards=mesh.size(number),
        is_first_replica=all(each == 0 for at, each in enumerate(coordinate) if at != number),
        dims={name: mesh.size(each) for each, name in enumerate(names)},
    )


def common_place(tree: Any) -> Place | None:
    """Return the place of all sharded tensors in a tree; None if there are none."""
    places = [place_of(leaf) for _, leaf in leaves(tree) if is_sharded(leaf)]
    if any(place != places[0] for place in places):
        raise CheckpointError("tensors on different device meshes can't be saved in one checkpoint")
    return places[0] if places else None


def rows_held(tensor: DTensor) -> range:
    """Return the rows that this process holds of a tensor."""
    place = place_of(tensor)
    rows = rows_of(tensor.shape[0], place.shard, place.num_shards)
    held = tensor.to_local().shape[0]
    assert len(rows) == held, f"shard {place.shard} has {held} of {tensor.shape[0]} rows, not {len(rows)}"
    return rows


def flat_name(path: Path) -> str:
    """Return a tensor's name in a shard's file."""
    return "/".join(map(str, path))


def pieces_in(tree: Any) -> dict[str, Piece]:
    """Return the pieces of a tree by flat name."""
    found = [(flat_name(path), leaf) for path, leaf in leaves(tree) if isinstance(leaf, Piece)]
    pieces = dict(found)
    assert len(pieces) == len(found), "two tensors have the same flat name"
    return pieces


def slices_of(pieces: dict[str, Piece]) -> list[Slice]:
    """Return the slices of a file: without empty pieces, and the widest types first, so that all are aligned."""
    held = [(name, piece) for name, piece in pieces.items() if piece.rows.numel()]
    held.sort(key=lambda item: -item[1].rows.element_size())
    return [_slice_of(name, piece) for name, piece in held]


def _slice_of(name: str, piece: Piece) -> Slice:
    rows, dtype = piece.rows, dtype_name(piece.rows.dtype)
    return Slice(name, dtype, len(rows), piece.first, piece.shape, rows.nbytes, piece.reader(), piece.written)


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a type; CheckpointError if it has none."""
    if dtype not in _DTYPES:
        raise CheckpointError(f"checkpoint.format=sharded can't hold {dtype}")
    return _DTYPES[dtype]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # has a buffer


def skeleton(tree: Any) -> Any:
    """Return a tree with a tensor on the meta device, of the whole tensor's shape, in place of each piece."""
    return mapped(tree, lambda leaf, _: _on_meta(leaf) if isinstance(leaf, Piece) else leaf)


def _on_meta(piece: Piece) -> Tensor:
    return torch.empty(piece.shape, dtype=piece.rows.dtype, device="meta")


def as_dtensor(rows: Tensor, shape: tuple[int, ...], like: DTensor) -> DTensor:
    """Return a DTensor of `shape`, of which this process holds `rows`, on the mesh of `like`."""
    from torch.distributed.tensor import DTensor

    local, is_same = like.to_local(), tuple(like.shape) == shape
    if is_same and local.stride() != rows.stride():  # channels last
        rows = torch.empty_like(local, dtype=rows.dtype).copy_(rows)
    stride = like.stride() if is_same else torch.empty(shape, device="meta").stride()
    made: DTensor = DTensor.from_local(
        rows.to(local.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )
    return made


def gathered(tree: Any, keeps: bool) -> Any:
    """Return a copy of a tree on the CPU, with whole tensors; collective. keeps: whether this process needs it."""

    def gather(leaf: Any, _: Path) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        whole = leaf.full_tensor().detach() if is_sharded(leaf) else leaf.detach()
        return whole.to("cpu", copy=True) if keeps else None

    return mapped(tree, gather)


def joined(tree: Any, like: Like) -> Any:
    """Return a tree with DTensors in place of its pieces."""

    def join(leaf: Any, path: Path) -> Any:
        return as_dtensor(leaf.rows, leaf.shape, like(path, leaf.shape)) if isinstance(leaf, Piece) else leaf

    return mapped(tree, join)


def like_tree(tree: Any) -> Like:
    """Return a lookup of a tree's DTensors by path."""

    def like(path: Path, _: tuple[int, ...]) -> Any:
        leaf = leaf_at(tree, path)
        return leaf if is_sharded(leaf) else None

    return like


def like_parameters(optimizer: torch.optim.Optimizer) -> Like:
    """Return a lookup for an optimiser's state: a tensor of its parameter's shape is sharded like the parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(path: Path, shape: tuple[int, ...]) -> Any:
        if path[0] != "state" or not path[1] < len(parameters):
            return None
        parameter = parameters[path[1]]
        # a parameter of FSDP2 is an nn.Parameter that holds a DTensor
        return parameter if is_sharded(parameter) and tuple(parameter.shape) == shape else None

    return like
