"""The source image_list: a CSV file that lists image files."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftexp.config.schema import DataConfig
from ftexp.data.info import SPLITS, Reader
from ftexp.data.label_cells import as_labels, label_columns, label_field, labels_key
from ftexp.data.listing import Listing, SteadyFile, digest_of
from ftexp.data.shared import Shared
from ftexp.data.sources.files import FileReader
from ftexp.data.sources.registry import register_source
from ftexp.errors import DataError
from ftexp.storage.directory import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_SPLIT = "split"


@register_source("image_list")
def image_list(config: DataConfig) -> Listing:
    """Read a CSV file (.tsv: separated by tabs) with a column of paths, one of labels and, optionally, `split`.

    `split` is train, val or test. Paths are relative to the list, or absolute if the list is on a local disk. Labels
    are text, or all are integers from 0; see `ftexp.data.label_cells` for cells with several labels, and for targets.
    """
    import pyarrow as pa

    listed = read_list(config)
    assert listed.labels is not None, "they are needed"
    rows: dict[str, list[int]] = {"train": []}
    for row, split in enumerate(listed.splits):
        rows.setdefault(split, []).append(row)
    if unknown := sorted(rows.keys() - set(SPLITS)):
        raise DataError(
            f"data.root={config.root}: its column '{_SPLIT}' holds {', '.join(map(repr, unknown))}; allowed: "
            f"{', '.join(SPLITS)}"
        )
    class_names, labels = as_labels(
        {split: [listed.labels[row] for row in own] for split, own in rows.items()},
        config,
        labels_key(config),
        lambda split, item: f"row {rows[split][item] + 1} of data.root={config.root}",
    )
    names = {split: [listed.paths[row] for row in own] for split, own in rows.items()}
    readers: dict[str, Reader] = {
        split: FileReader(listed.filesystem, listed.directory, Shared(pa.array(own, pa.large_string())))
        for split, own in names.items()
    }
    return Listing(class_names, labels, readers, digest=digest_of(class_names, labels, names))


@dataclass(frozen=True)
class ListedFiles:
    """The rows of a list."""

    filesystem: FileSystem
    directory: str  # common parent directory of all files
    paths: list[str]  # relative to `directory`
    labels: list[Any] | None  # label cells; with several columns, a cell is a list; None: a column is missing
    splits: list[str]


def read_list(config: DataConfig, labelled: bool = True) -> ListedFiles:
    """Read the list at data.root; DataError if it can't be read or lacks a column.

    labelled: whether labels are required.
    """
    filesystem, root = open_uri(config.root or "", "data.root")
    paths, labels, splits = _columns(filesystem, root, config, labelled)
    on_disk = root.startswith("/")
    if foreign := next((path for path in paths if "://" in path or (path.startswith("/") and not on_disk)), None):
        raise DataError(f"{root} lists {foreign}: paths are relative to the list, or absolute where it is on a disk")
    files = [posixpath.join(posixpath.dirname(root), path) for path in paths]
    directory = posixpath.commonpath([posixpath.dirname(file) for file in files]).rstrip("/")
    depth = len(_components(directory))
    return ListedFiles(filesystem, directory, [_below(file, depth) for file in files], labels, splits)


def _components(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _below(file: str, depth: int) -> str:
    """Return the path without its first `depth` components; "." and empty ones are ignored, as by `commonpath`."""
    parts, skipped = file.lstrip("/").split("/"), 0
    while skipped < depth:
        skipped += parts.pop(0) not in ("", ".")
    return "/".join(parts)


def _columns(
    filesystem: FileSystem, root: str, config: DataConfig, labelled: bool
) -> tuple[list[str], list[Any] | None, list[str]]:
    """Return the path, label and split of each row, as three columns."""
    import pyarrow as pa
    from pyarrow import csv

    wanted = label_columns(config)
    names = (config.image_column, *wanted, _SPLIT)
    try:
        with SteadyFile(filesystem, root) as opened:
            table = csv.read_csv(
                opened,
                parse_options=csv.ParseOptions(delimiter="\t" if root.lower().endswith(".tsv") else ","),
                # otherwise pyarrow would infer types, and a label 1.0 would become 1
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.root={config.root} can't be read as a list of images: {error}") from error
    for column in (config.image_column, *(wanted if labelled else ())):
        if column not in table.column_names:
            raise DataError(
                f"{root} has no column '{column}', but {table.column_names}: set data.image_column and "
                f"{label_field(config)}; the first line names the columns"
            )
    if not len(table):
        raise DataError(f"data.root={config.root} lists no image")
    found = {name: table[name].to_pylist() for name in names if name in table.column_names}
    labels = [found[name] for name in wanted if name in found]
    cells = None if len(labels) < len(wanted) else labels[0] if len(labels) == 1 else list(zip(*labels, strict=True))
    return found[config.image_column], cells, found.get(_SPLIT, ["train"] * len(table))
