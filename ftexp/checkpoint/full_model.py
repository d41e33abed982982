"""Conversion of a sharded checkpoint's parts to torch.save's format, tensor by tensor in bounded memory.

The file is laid out first, with room for the tensors; then their rows are copied from the shards' files.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ftexp.checkpoint.manifest import MODEL, Manifest
from ftexp.checkpoint.reading import read_outlines, read_shards
from ftexp.checkpoint.sharding import bytes_of, dtype_name, flat_name
from ftexp.checkpoint.slices import Wanted
from ftexp.checkpoint.store import CheckpointStore
from ftexp.checkpoint.torch_file import lay_out
from ftexp.checkpoint.tree import leaves
from ftexp.errors import CheckpointError
from ftexp.model.parallel.parts import rows_of
from ftexp.storage.directory import Writer, write_all

_COPY_BYTES = 1 << 22


def add_full_models(store: CheckpointStore, steps: set[int | None]) -> Iterator[tuple[str, Exception]]:
    """Add model.pt to the sharded checkpoints of these steps that lack it; yield (name, error) for each failure."""
    try:
        manifests = [each for each in store.manifests(lambda *_: None) if each.step in steps and each.mesh is not None]
    except OSError as error:
        yield "checkpoints", error
        return
    for manifest in manifests:
        try:
            if MODEL not in manifest.files:
                store.add(manifest, {MODEL: full_writer(store, manifest, MODEL)})
        except (OSError, CheckpointError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            yield manifest.name, error


def full_writer(store: CheckpointStore, manifest: Manifest, name: str) -> Writer:
    """Return a function that writes a sharded checkpoint's part `name`, of FILES, as an unsharded checkpoint has it."""

    def write(stream: BinaryIO) -> None:
        outline = read_outlines(store, manifest)[name]
        # in the checkpoints' directory, if it is local: its disk has room for a model
        directory = store.storage.local_path
        with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp-") as place:
            path = Path(place) / name
            _fill(store, manifest, name, outline, path)
            with path.open("rb") as file:
                while chunk := file.read(_COPY_BYTES):
                    write_all(stream, chunk)

    return write


def _fill(store: CheckpointStore, manifest: Manifest, name: str, outline: Any, path: Path) -> None:
    offsets = lay_out(outline, path)
    wanted: dict[int, list[Wanted]] = defaultdict(list)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        tensors = [(place, leaf) for place, leaf in leaves(outline) if isinstance(leaf, Tensor)]
        for (place, tensor), offset in zip(tensors, offsets, strict=True):
            if not tensor.is_meta:
                os.pwrite(descriptor, bytes_of(tensor.contiguous()), offset)
                continue
            row_bytes = tensor[:1].nbytes
            for shard in range(manifest.num_shards or 0):
                if rows := rows_of(tensor.shape[0], shard, manifest.num_shards or 0):
                    put = functools.partial(_put, descriptor, offset + rows.start * row_bytes)
                    flat, shape = flat_name(place), tuple(tensor.shape)
                    wanted[shard].append(Wanted(flat, rows, dtype_name(tensor.dtype), shape, put))
        read_shards(store, manifest, name, wanted)
    finally:
        os.close(descriptor)


def _put(descriptor: int, base: int, offset: int, data: memoryview) -> None:
    os.pwrite(descriptor, data, base + offset)
