"""Which rows of a sharded tensor lie where: arithmetic, and the DTensors of a process.

Tensors are cut by rows (their first dimension) into as many shards as there are processes in a replica, as
`torch.chunk` and FSDP2 cut them: each has the same number of rows, but for the last ones, which may have fewer or none.
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
# path and shape of a saved tensor -> the DTensor that takes it, or None
Like = Callable[[Path, tuple[int, ...]], Any]


def overlaps(num_rows: int, rows: range, num_shards: int) -> Iterator[tuple[int, range]]:
    """Yield (shard, rows) of those of `num_shards` shards that hold some of `rows`, with what they hold of them."""
    if not rows:
        return
    size = len(rows_of(num_rows, 0, num_shards))
    for shard in range(rows.start // size, (rows.stop - 1) // size + 1):
        held = rows_of(num_rows, shard, num_shards)
        yield shard, range(max(rows.start, held.start), min(rows.stop, held.stop))


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that share tensors."""

    shard: int
    num_shards: int
    is_first_replica: bool  # whose processes write
    dims: dict[str, int]  # sizes of the device mesh, by name


@dataclass(eq=False)
class Piece:
    """The rows of a tensor that a process holds: a copy."""

    rows: Tensor
    first: int  # row of the whole tensor
    shape: tuple[int, ...]  # shape of the whole tensor

    def with_rows(self, use: Callable[[Tensor], Any]) -> Any:
        """Return what `use` returns of the rows, which don't change meanwhile."""
        return use(self.rows)

    def reader(self) -> Callable[[int, int], memoryview]:
        """Return what gives bytes from .. to .. of the rows, which hold until its next call."""
        data = bytes_of(self.rows.contiguous())
        return lambda begin, end: data[begin:end]

    def written(self) -> None:
        """Take note that the rows are where they shall go."""


class Guard:
    """Held while rows that are trained on are read, or copied because they are about to change."""

    def __init__(self) -> None:
        self.lock, self._scratch = threading.Lock(), bytearray()

    def scratch(self, num_bytes: int) -> memoryview:
        """Return memory that holds until the next call."""
        if len(self._scratch) < num_bytes:
            self._scratch = bytearray(num_bytes)
        return memoryview(self._scratch)[:num_bytes]


class LivePiece(Piece):
    """Rows that are trained on, contiguous; training waits for nobody who reads them, but for a few bytes at a time."""

    def __init__(self, rows: Tensor, first: int, shape: tuple[int, ...], guard: Guard) -> None:
        super().__init__(rows, first, shape)
        self._guard, self._is_live, self._is_written, self._is_gone = guard, True, False, False

    def with_rows(self, use: Callable[[Tensor], Any]) -> Any:
        """As of any piece; training waits for `use`."""
        with self._guard.lock:
            return use(self.rows)

    def reader(self) -> Callable[[int, int], memoryview]:
        """As of any piece. CheckpointError: the rows have changed since they were written."""
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
        """Take note that the rows need no copy any more."""
        with self._guard.lock:
            self._is_written = True

    def settle(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Keep a copy of the rows, which are about to change, unless they are written; under the guard."""
        if not self._is_written:
            self.rows = copy(self.rows)
        self._is_live, self._is_gone = False, self._is_written


def is_sharded(leaf: Any) -> TypeGuard[DTensor]:
    """Whether a leaf is a DTensor, by its methods: importing the class takes time, which other runs don't spend."""
    return isinstance(leaf, Tensor) and hasattr(leaf, "full_tensor")


def place_of(tensor: DTensor) -> Place:
    """Return where this process stands; CheckpointError if the tensor isn't cut by rows, along one mesh dimension."""
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
    """Return what a tensor is called in a file of shards."""
    return "/".join(map(str, path))


def pieces_in(tree: Any) -> dict[str, Piece]:
    """Return the pieces of a tree by flat name."""
    found = [(flat_name(path), leaf) for path, leaf in leaves(tree) if isinstance(leaf, Piece)]
    pieces = dict(found)
    assert len(pieces) == len(found), "two tensors have the same flat name"
    return pieces


def slices_of(pieces: dict[str, Piece]) -> list[Slice]:
    """Return pieces as a file holds them: without empty ones, and the widest numbers first, which keeps all aligned."""
    held = [(name, piece) for name, piece in pieces.items() if piece.rows.numel()]
    held.sort(key=lambda item: -item[1].rows.element_size())
    return [_slice_of(name, piece) for name, piece in held]


def _slice_of(name: str, piece: Piece) -> Slice:
    rows, dtype = piece.rows, dtype_name(piece.rows.dtype)
    return Slice(name, dtype, len(rows), piece.first, piece.shape, rows.nbytes, piece.reader(), piece.written)


def dtype_name(dtype: torch.dtype) -> str:
    """Return what safetensors calls a type; CheckpointError if it has no name for it."""
    if dtype not in _DTYPES:
        raise CheckpointError(f"checkpoint.format=sharded can't hold {dtype}")
    return _DTYPES[dtype]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # has a buffer


def skeleton(tree: Any) -> Any:
    """Return a tree with an empty tensor on the meta device, of the whole's shape, for each piece."""
    return mapped(tree, lambda leaf, _: _on_meta(leaf) if isinstance(leaf, Piece) else leaf)


def _on_meta(piece: Piece) -> Tensor:
    return torch.empty(piece.shape, dtype=piece.rows.dtype, device="meta")


def as_dtensor(rows: Tensor, shape: tuple[int, ...], like: DTensor) -> DTensor:
    """Return the tensor of `shape` of which this process holds `rows`, on the mesh of `like`."""
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
    """Return a copy of a tree on the CPU, with whole tensors; collective. keeps: whether this process wants it."""

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
    """Return where the DTensors of a tree are."""

    def like(path: Path, _: tuple[int, ...]) -> Any:
        leaf = leaf_at(tree, path)
        return leaf if is_sharded(leaf) else None

    return like


def like_parameters(optimizer: torch.optim.Optimizer) -> Like:
    """Return where an optimiser's state dict has DTensors: what has a parameter's shape lies as the parameter does."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(path: Path, shape: tuple[int, ...]) -> Any:
        if path[0] != "state" or not path[1] < len(parameters):
            return None
        parameter = parameters[path[1]]
        # a parameter of FSDP2 is an nn.Parameter that holds a DTensor
        return parameter if is_sharded(parameter) and tuple(parameter.shape) == shape else None

    return like
