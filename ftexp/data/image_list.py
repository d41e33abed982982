"""Lists of image files."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from ftexp.config import DataConfig
from ftexp.data.files import FileReader
from ftexp.data.listing import Listing, Reader, Shared, SteadyFile
from ftexp.data.named_files import as_label, class_numbers
from ftexp.data.sources import sources
from ftexp.data.splits import SPLITS
from ftexp.errors import DataError
from ftexp.storage import open_uri

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_SPLIT = "split"


@sources.register("image_list")
def image_list(config: DataConfig) -> Listing:
    """A CSV file (.tsv: with tabs) with a column of paths, one of labels, and perhaps `split`: train, val or test.

    Paths are relative to the list's folder, or absolute if it is on a disk. Labels are whole numbers from 0, or text.
    """
    import pyarrow as pa

    filesystem, root = open_uri(config.root or "", "data.root")
    paths, raw_labels, splits = _columns(filesystem, root, config)
    rows: dict[str, list[int]] = {"train": []}
    for row, split in enumerate(splits):
        rows.setdefault(split, []).append(row)
    if unknown := sorted(rows.keys() - set(SPLITS)):
        raise DataError(
            f"{root}: its column '{_SPLIT}' holds {', '.join(map(repr, unknown))}; allowed: {', '.join(SPLITS)}"
        )
    on_disk = root.startswith("/")
    if foreign := next((path for path in paths if "://" in path or (path.startswith("/") and not on_disk)), None):
        raise DataError(f"{root} lists {foreign}: paths are relative to the list, or absolute where it is on a disk")
    files = [posixpath.join(posixpath.dirname(root), path) for path in paths]
    folder = posixpath.commonpath([posixpath.dirname(file) for file in files]).rstrip("/")
    below = [file[len(folder) + 1 :] for file in files]
    raw = {split: [as_label(raw_labels[row]) for row in own] for split, own in rows.items()}
    class_names, labels = class_numbers(raw, f"data.label_column={config.label_column}")
    readers: dict[str, Reader] = {
        split: FileReader(filesystem, folder, Shared(pa.array([below[row] for row in own], pa.large_string())))
        for split, own in rows.items()
    }
    return Listing(class_names, labels, readers)


def _columns(filesystem: FileSystem, root: str, config: DataConfig) -> tuple[list[str], list[str], list[str]]:
    """Path, label and split of each row."""
    import pyarrow as pa
    from pyarrow import csv

    names = (config.image_column, config.label_column, _SPLIT)
    try:
        with SteadyFile(filesystem, root) as opened:
            table = csv.read_csv(
                opened,
                parse_options=csv.ParseOptions(delimiter="\t" if root.endswith(".tsv") else ","),
                # pyarrow guesses types otherwise: a label 1.0 would become 1
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.root={config.root} can't be read as a list of images: {error}") from error
    for column in names[:2]:
        if column not in table.column_names:
            raise DataError(
                f"{root} has no column '{column}', but {table.column_names}: set data.image_column and "
                "data.label_column; the first line names the columns"
            )
    if not len(table):
        raise DataError(f"data.root={config.root} lists no image")
    paths, labels = (table[column].to_pylist() for column in names[:2])
    return paths, labels, table[_SPLIT].to_pylist() if _SPLIT in table.column_names else ["train"] * len(table)
