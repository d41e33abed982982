"""Conversion of checkpoints between the sharded and the full format; the content stays bitwise identical."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ftexp.checkpoint.full_model import full_writer
from ftexp.checkpoint.manifest import EXTRA, FILES, Manifest, shard_file
from ftexp.checkpoint.reading import read_part, read_whole
from ftexp.checkpoint.sharding import Piece, pieces_in, skeleton, slices_of
from ftexp.checkpoint.slices import SliceFile
from ftexp.checkpoint.staging import writer
from ftexp.checkpoint.store import CheckpointStore
from ftexp.checkpoint.tree import Path, mapped
from ftexp.model.parallel.parts import rows_of


def as_full(store: CheckpointStore, manifest: Manifest, out: CheckpointStore) -> Manifest:
    """Write a sharded checkpoint to `out` as model.pt, optimizer.pt and extra_state.pt, in bounded memory.

    OSError if it can't be written, CheckpointError if it isn't as it was written.
    """
    whole = dataclasses.replace(manifest, files={}, mesh=None)
    return out.save(whole, {name: full_writer(store, manifest, name) for name in FILES})


def as_sharded(store: CheckpointStore, manifest: Manifest, out: CheckpointStore, num_shards: int) -> Manifest:
    """Write a checkpoint to `out` as `num_shards` processes would, with one part of it in memory at a time.

    A part in a local file is mapped into memory instead. Errors as of `as_full`.
    """
    outlines, files = dict[str, Any](), dict[str, dict[str, Any]]()
    try:
        for name in FILES:
            is_whole = manifest.mesh is None
            part = read_whole(store, manifest, name, is_cut=True) if is_whole else read_part(store, manifest, name)
            outlines[name] = skeleton(_shard(part, 0, num_shards))
            for shard in range(num_shards):
                if pieces := pieces_in(_shard(part, shard, num_shards)):
                    file = shard_file(name, shard, num_shards)
                    files |= out.write(manifest.name, {file: SliceFile(slices_of(pieces))})
        files |= out.write(manifest.name, {EXTRA: writer(outlines)})
        mesh = {"dims": {"shard": num_shards}, "num_shards": num_shards}
        return out.commit(dataclasses.replace(manifest, files=files, mesh=mesh))
    except BaseException:
        out.discard(manifest.name)
        raise


def _shard(tree: Any, shard: int, num_shards: int) -> Any:
    """Return a tree with a shard's pieces in place of floating-point tensors that have at least one dimension."""

    def cut(leaf: Any, _: Path) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.dim():
            return leaf
        rows = rows_of(len(leaf), shard, num_shards)
        return Piece(leaf[rows.start : rows.stop], rows.start, tuple(leaf.shape))

    return mapped(tree, cut)
