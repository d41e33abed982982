"""Layout of a torch.save file whose tensors are filled in later.

`torch.serialization.skip_data` is public, but torch calls it a prototype: only this module uses it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ftexp.checkpoint.tree import Path as TreePath
from ftexp.checkpoint.tree import mapped

_LOCAL_HEADER_BYTES = 30  # in front of an entry of a zip file; ends with the lengths of its name and extra field


def lay_out(tree: Any, path: Path) -> list[int]:
    """Write `tree` with room for its tensors, contiguous; returns the offsets of their data, in the tree's order."""
    with torch.serialization.skip_data():
        torch.save(mapped(tree, _blank), path)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        found = [entry for entry in archive.infolist() if _is_data(entry.filename)]
        found.sort(key=lambda entry: int(entry.filename.rpartition("/")[2]))
        return [_data_offset(file, entry.header_offset) for entry in found]


def _blank(leaf: Any, _: TreePath) -> Any:
    # memory that is never touched is never allocated
    return torch.empty(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _is_data(name: str) -> bool:
    directory, _, number = name.rpartition("/")
    return directory.endswith("/data") and number.isdigit()


def _data_offset(file: BinaryIO, header: int) -> int:
    file.seek(header)
    local = file.read(_LOCAL_HEADER_BYTES)
    lengths = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    return header + _LOCAL_HEADER_BYTES + sum(lengths)
