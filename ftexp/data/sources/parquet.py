"""The source parquet: Parquet files with images and labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ftexp.config.schema import DataConfig
from ftexp.data.info import Raw
from ftexp.data.label_cells import as_labels, label_columns, label_field, labels_key
from ftexp.data.listing import Listing, SteadyFile, digest_of
from ftexp.data.order import Int64s
from ftexp.data.shared import Shared
from ftexp.data.sources.blocks import BlockReader
from ftexp.data.sources.entries import Account
from ftexp.data.sources.named_files import files_by_split
from ftexp.data.sources.registry import register_source
from ftexp.errors import DataError
from ftexp.storage.directory import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


@register_source("parquet")
def parquet(config: DataConfig) -> Listing:
    """List Parquet files with an image column (encoded bytes, {"bytes": ...} or arrays) and a label column.

    Labels may be integers from 0 or text, or lists of them. Files named train*, val* and test* (or in such directories)
    form splits if there is a train*.
    """
    import pyarrow as pa

    filesystem, root = open_uri(config.root or "", "data.root")
    raw_labels: dict[str, list[Any]] = {}
    groups: dict[str, list[RowGroup]] = {}
    account = Account()
    for split, paths in files_by_split(filesystem, root, config, ".parquet", account).items():
        raw_labels[split], groups[split] = [], []
        for path in paths:
            try:
                found = list(labels_of(filesystem, path, config))
            except (OSError, pa.ArrowException) as error:
                if config.on_bad_sample == "fail":
                    raise DataError(
                        f"{path} can't be read as parquet: {error}; fix it, remove it from data.root, or exclude "
                        "such files with data.on_bad_sample=skip"
                    ) from error
                account.add_bad(path, f"{type(error).__name__}: {error}")
                continue
            for group, values in enumerate(found):
                groups[split].append(RowGroup(path, group, len(raw_labels[split])))
                raw_labels[split] += values
    class_names, labels = as_labels(
        raw_labels,
        config,
        labels_key(config),
        lambda split, item: _place(groups[split], item),
        is_text=False,
    )
    return Listing(
        class_names,
        labels,
        {
            split: BlockReader(RowGroups(filesystem, config.image_column, Shared(found)))
            for split, found in groups.items()
        },
        {
            split: np.diff([*(group.first_item for group in found), len(labels[split])])
            for split, found in groups.items()
        },
        bad=account.bad,
        excluded=account.excluded,
        digest=digest_of(
            class_names,
            labels,
            {
                split: [f"{group.path.removeprefix(root)} {group.number} {group.first_item}" for group in found]
                for split, found in groups.items()
            },
        ),
    )


class RowGroup(NamedTuple):
    """A row group: the unit in which Parquet is read."""

    path: str
    number: int  # index in its file
    first_item: int


def _place(groups: list[RowGroup], item: int) -> str:
    group = max((group for group in groups if group.first_item <= item), key=lambda group: group.first_item)
    return f"{group.path} row {item - group.first_item} of group {group.number}"


@dataclass(frozen=True)
class RowGroups:
    """The image columns of row groups, as blocks."""

    filesystem: FileSystem
    image_column: str
    groups: Shared[list[RowGroup]]

    def first_items(self) -> Int64s:
        """Return the first item of each row group."""
        return np.array([group.first_item for group in self.groups.get()], np.int64)

    def fetch(self, block: int) -> Any:
        """Return the image column of a row group."""
        import pyarrow.parquet as pq

        path, number, _ = self.groups.get()[block]

        with SteadyFile(self.filesystem, path) as opened, pq.ParquetFile(opened) as file:
            return file.read_row_group(number, [self.image_column])[self.image_column]

    def pick(self, data: Any, block: int, row: int) -> Raw:
        """Return a cell of the column."""
        return self.where(block, row), data[row].as_py

    def where(self, block: int, row: int) -> str:
        """Return the file, the row group and the row."""
        path, number, _ = self.groups.get()[block]
        return f"{path} row {row} of group {number}"


def labels_of(filesystem: FileSystem, path: str, config: DataConfig, labelled: bool = True) -> Iterator[list[Any]]:
    """Yield the labels of each row group; DataError if a column is missing.

    labelled: whether labels are required; if not, and the column is missing, labels are None.
    """
    import pyarrow.parquet as pq

    with SteadyFile(filesystem, path) as opened, pq.ParquetFile(opened) as file:
        wanted = label_columns(config)
        has_labels = set(wanted) <= set(file.schema_arrow.names)
        for column in (config.image_column, *(wanted if labelled else [])):
            if column not in file.schema_arrow.names:
                raise DataError(
                    f"{path} has no column '{column}', but {file.schema_arrow.names}: set data.image_column "
                    f"and {label_field(config)}"
                )
        for group in range(file.num_row_groups):
            if has_labels:
                table = file.read_row_group(group, list(wanted))
                columns = [table[name].to_pylist() for name in wanted]
                yield columns[0] if len(columns) == 1 else [list(row) for row in zip(*columns, strict=True)]
            else:
                yield [None] * file.metadata.row_group(group).num_rows
