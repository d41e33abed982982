"""Parquet files with images and labels. Decoding runs as Ray tasks, on any node, a row group each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config import DataConfig
from ftexp.data.decoding import Row, decoded_bundle, split_items
from ftexp.data.order import Int64s
from ftexp.data.sources import sources
from ftexp.data.splits import SPLITS, DataBundle
from ftexp.errors import DataError
from ftexp.storage import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@sources.register("parquet")
def parquet(config: DataConfig) -> DataBundle:
    """Parquet files with an image column (encoded bytes, {"bytes": ...} or arrays) and a label column.

    Labels may be whole numbers from 0 or text; files named train*, val* and test* (or in such folders) are
    splits of their own if there is a train one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray.data
    from pyarrow.fs import FileSelector, FileType

    filesystem, root = open_uri(config.root or "", "data.root")
    info = filesystem.get_file_info(root)
    files = [info] if info.type == FileType.File else []
    if info.type == FileType.Directory:
        found = filesystem.get_file_info(FileSelector(root, recursive=True))
        files = [f for f in found if f.type == FileType.File and _is_parquet(PurePosixPath(f.path).relative_to(root))]
    if not files:
        raise DataError(f"data.root={config.root} is neither a parquet file nor a folder with .parquet files in it")
    by_split = _files_by_split(root, sorted(f.path for f in files))
    raw_labels: dict[str, list[Any]] = {}
    groups: dict[str, list[tuple[str, int, int]]] = {}  # file, row group, number of its first sample in the split
    for split, paths in by_split.items():
        raw_labels[split], groups[split] = [], []
        for path in paths:
            try:
                for group, values in enumerate(_labels_of(filesystem, path, config)):
                    groups[split].append((path, group, len(raw_labels[split])))
                    raw_labels[split] += values
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{path} can't be read as parquet: {error}; mend it, or take it out of data.root"
                ) from error
    class_names, labels = _class_numbers(raw_labels, config)
    items = split_items(config, labels)
    image_column, label_column = config.image_column, config.label_column
    numbers = {name: number for number, name in enumerate(class_names)}

    def read(batch: dict[str, Any]) -> Iterator[Row]:
        for path, group, first, wanted in zip(*(batch[k] for k in ("path", "group", "first", "wanted")), strict=True):
            where = [f"{path} row {int(position)} of group {group}" for position in wanted]
            try:
                with pq.ParquetFile(filesystem.open_input_file(path)) as file:
                    table = file.read_row_group(int(group), [image_column, label_column]).take(pa.array(wanted))
            except (OSError, pa.ArrowException) as error:  # a damaged page: none of its rows can be had
                for row, position in enumerate(wanted):
                    yield int(first + position), 0, where[row], _raiser(error)
                continue
            for row, position in enumerate(wanted):
                label, value = table[label_column][row].as_py(), table[image_column][row]
                number = numbers[label] if isinstance(label, str) else int(label)
                yield int(first + position), number, where[row], value.as_py

    raw = {}
    for split, (origin, positions) in items.items():
        table: dict[str, list[Any]] = {"path": [], "group": [], "first": [], "wanted": []}
        ends = [*(first for _, _, first in groups[origin]), len(labels[origin])][1:]
        for (path, group, first), end in zip(groups[origin], ends, strict=True):
            wanted = positions[(positions >= first) & (positions < end)] - first
            if len(wanted):
                for key, value in zip(table, (path, group, first, wanted.tolist()), strict=True):
                    table[key].append(value)
        raw[split] = ray.data.from_arrow(pa.table(table)).repartition(max(1, min(len(table["path"]), 256)))
    return decoded_bundle(config, raw, read, class_names, batch_size=1)  # a row group at a time: any may be large


def _is_parquet(path: PurePosixPath) -> bool:
    return path.suffix == ".parquet" and not any(part.startswith(".") for part in path.parts)


def _labels_of(filesystem: FileSystem, path: str, config: DataConfig) -> Iterator[list[Any]]:
    """The labels of each row group."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(filesystem.open_input_file(path)) as file:
        for column in (config.image_column, config.label_column):
            if column not in file.schema_arrow.names:
                raise DataError(
                    f"{path} has no column '{column}', but {file.schema_arrow.names}: set data.image_column "
                    "and data.label_column"
                )
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, [config.label_column])[0].to_pylist()


def _raiser(error: Exception) -> Callable[[], Any]:
    def get() -> Any:
        raise error

    return get


def _files_by_split(root: str, paths: list[str]) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for path in paths:
        relative = PurePosixPath(path).relative_to(root).parts if path != root else (PurePosixPath(path).name,)
        split = next((s for part in relative for s in SPLITS if part.startswith(s)), "train")  # outermost part wins
        named.setdefault(split, []).append(path)
    explicit = any(part.startswith("train") for path in paths for part in PurePosixPath(path).relative_to(root).parts)
    return named if explicit else {"train": paths}


def _class_numbers(raw: dict[str, list[Any]], config: DataConfig) -> tuple[list[str], dict[str, Int64s]]:
    values = [value for column in raw.values() for value in column]
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return names, {split: np.array([numbers[v] for v in column], np.int64) for split, column in raw.items()}
    if all(isinstance(value, int) and value >= 0 for value in values):
        names = [str(number) for number in range(max(values) + 1)]
        return names, {split: np.array(column, np.int64) for split, column in raw.items()}
    shown = ", ".join(sorted({repr(value) for value in values if not (isinstance(value, int) and value >= 0)})[:5])
    raise DataError(
        f"data.label_column={config.label_column} holds {shown}: labels are all text, or all whole numbers from 0"
    )
