"""Reading a checkpoint in either format: with whole tensors, or with the rows that this process holds."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ftexp.checkpoint import slices
from ftexp.checkpoint.manifest import EXTRA, MODEL, Manifest, content_hash, expected_of, shard_file
from ftexp.checkpoint.sharding import Like, Piece, bytes_of, dtype_name, flat_name, joined, overlaps, place_of
from ftexp.checkpoint.slices import Wanted
from ftexp.checkpoint.staging import load_part
from ftexp.checkpoint.store import CheckpointStore
from ftexp.checkpoint.tree import Path, mapped
from ftexp.errors import CheckpointError
from ftexp.model.parallel.parts import rows_of
from ftexp.storage.directory import Storage


def read_part(store: CheckpointStore, manifest: Manifest, name: str) -> Any:
    """Return the content of `name`, of FILES, on the CPU; if the checkpoint is sharded, with whole tensors.

    CheckpointError if the checkpoint isn't as it was written.
    """
    return read_parts(store, manifest, [name])[name]


def read_parts(
    store: CheckpointStore, manifest: Manifest, names: Iterable[str], like: Mapping[str, Like] | None = None
) -> dict[str, Any]:
    """Return the content of several parts, {name: content}; errors as of `read_part`.

    like: by name, lookup of the DTensors that will load the content. Of these, only this process's rows are read.
    """
    like = like or {}
    if manifest.num_shards is None:
        return {name: cut(read_whole(store, manifest, name, name in like), like.get(name)) for name in names}
    outlines = read_outlines(store, manifest)
    return {name: _filled(store, manifest, name, outlines[name], like.get(name)) for name in names}


def read_whole(store: CheckpointStore, manifest: Manifest, name: str, is_cut: bool) -> Any:
    """Return the content of one of FILES. is_cut: only some rows are needed, so a local file is mapped into memory."""
    path = store.storage.child(manifest.name).local_path
    if is_cut and path is not None:
        store.verify_file(manifest, name)
        return load_part(name, path / name)
    return load_part(name, store.read_file(manifest, name))


def read_outlines(store: CheckpointStore, manifest: Manifest) -> dict[str, Any]:
    """Return the content of a sharded checkpoint, {name: content}, with sharded tensors on the meta device."""
    outlines: dict[str, Any] = load_part(EXTRA, store.read_file(manifest, EXTRA))
    return outlines


def read_shards(store: CheckpointStore, manifest: Manifest, name: str, wanted: Mapping[int, Iterable[Wanted]]) -> None:
    """Read rows of a part from its shards' files, {shard: rows}; CheckpointError if one isn't as it was written."""
    directory = store.storage.child(manifest.name)
    for shard, each in sorted(wanted.items()):
        file = shard_file(name, shard, manifest.num_shards or 0)
        try:
            slices.read(directory, file, expected_of(manifest, file), each)
        except OSError as error:
            raise store.damage(file, error) from error


def read_weights(store: CheckpointStore, manifest: Manifest, weights: str) -> dict[str, Tensor]:
    """Return a state dict of the bare model: the `raw` weights, or `ema`, their EMA.

    CheckpointError if the checkpoint isn't as it was written, or has no EMA.
    """
    if weights == "raw":
        raw: dict[str, Tensor] = read_part(store, manifest, MODEL)
        return raw
    average: dict[str, Tensor] = read_part(store, manifest, EXTRA).get("ema", {}).get("weights")
    if not average:
        raise CheckpointError("weights=ema, but the run had no EMA (ema.decay): set weights=raw")
    return average


def weights_at(uri: str, name: str) -> tuple[dict[str, Tensor], str]:
    """Return the weights in `name`, of FILES, of the checkpoint at `uri`, and the content's hash.

    The checkpoint may be sharded. Errors as of `read_weights`.
    """
    directory = Storage.at(uri)
    store = CheckpointStore(directory.parent)
    manifest = store.by_name(directory.name)
    return read_weights(store, manifest, "raw" if name == MODEL else "ema"), content_hash(manifest, name)


def cut(tree: Any, like: Like | None) -> Any:
    """Return a tree in which tensors that `like` has as DTensors are DTensors of this process's rows."""
    if like is None:
        return tree

    def held(leaf: Any, path: Path) -> Any:
        shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
        taker = like(path, shape) if shape else None
        if taker is None:
            return leaf.clone() if isinstance(leaf, Tensor) else leaf
        rows = rows_of(shape[0], place_of(taker).shard, place_of(taker).num_shards)
        return Piece(leaf[rows.start : rows.stop].clone(), rows.start, shape)

    return joined(mapped(tree, held), like)


def _filled(store: CheckpointStore, manifest: Manifest, name: str, outline: Any, like: Like | None) -> Any:
    """Read the sharded tensors of an outline, and return it with them: whole, or as DTensors of this process's rows."""
    wanted: dict[int, list[Wanted]] = defaultdict(list)

    def allocate(leaf: Any, path: Path) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_meta):
            return leaf
        shape = tuple(leaf.shape)
        taker = like(path, shape) if like is not None else None
        rows = range(shape[0])
        if taker is not None:
            rows = rows_of(shape[0], place_of(taker).shard, place_of(taker).num_shards)
        held = torch.empty((len(rows), *shape[1:]), dtype=leaf.dtype)
        row_bytes = held[:1].nbytes
        for shard, some in overlaps(shape[0], rows, manifest.num_shards or 0):
            put = functools.partial(_put, bytes_of(held)[(some.start - rows.start) * row_bytes :])
            wanted[shard].append(Wanted(flat_name(path), some, dtype_name(leaf.dtype), shape, put))
        return held if taker is None else Piece(held, rows.start, shape)

    tree = mapped(outline, allocate)
    read_shards(store, manifest, name, wanted)
    return tree if like is None else joined(tree, like)


def _put(memory: memoryview, offset: int, data: memoryview) -> None:
    memory[offset : offset + len(data)] = data
