"""Sources that decode files: folders of images, and parquet. Decoding runs as Ray tasks, on any node."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config import DataConfig
from ftexp.data.order import Int64s
from ftexp.data.sources import UInt8s, make_info, sources
from ftexp.data.splits import SPLITS, BadSample, DataBundle, stratified_split
from ftexp.errors import DataError
from ftexp.storage import open_uri

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import FileSystem

_NUM_BAD_SHOWN = 10
_SPLIT_NAMES = {"valid": "val", "validation": "val"}
_Row = tuple[int, int, str, Callable[[], Any]]  # sample, label, where it is, how to get the image


def decode_image(encoded: bytes, size: int, channels: int) -> UInt8s:
    """Decode anything Pillow reads into uint8 [size, size, channels]: shorter side to `size`, centre crop."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded)) as opened:
        readable = opened if opened.mode[0] not in "IF" else Image.fromarray(_high_bytes(opened))
        image = readable.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8).reshape(size, size, channels)


def _high_bytes(image: Any) -> UInt8s:
    """16-bit grey as 8-bit; Pillow's own conversion cuts everything above 255 off."""
    if not image.mode.startswith("I;16"):
        raise ValueError(f"pixels of Pillow's mode {image.mode}, whose range isn't known")
    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)


@sources.register("image_folder")
def image_folder(config: DataConfig) -> DataBundle:
    """One folder a class, or train/, val/, test/ with such folders inside; any format that Pillow reads."""
    import ray.data

    filesystem, root = open_uri(config.root or "", "data.root")
    listed = _list_images(filesystem, root, config)
    own_splits = set(listed) <= {*SPLITS, "valid", "validation"} and "train" in listed
    if own_splits:
        by_split = _inside_splits(listed, config)
        class_names = sorted({label for files in by_split.values() for _, label in files})
    else:
        by_split = {"train": [(f"{name}/{rest}", name) for name, files in listed.items() for rest, _ in files]}
        class_names = sorted(listed)
    numbers = {name: number for number, name in enumerate(class_names)}
    paths = {name: [path for path, _ in sorted(files)] for name, files in by_split.items()}
    labels = {name: np.array([numbers[c] for _, c in sorted(files)], np.int64) for name, files in by_split.items()}
    prefixes = {name: f"{root}/{_folder_of(listed, name)}" if own_splits else root for name in by_split}
    items = _split_items(config, labels)

    def rows_of(split: str, positions: Int64s) -> Any:
        origin = items[split][0]
        table = {
            "sample": positions,
            "label": labels[origin][positions],
            "path": [f"{prefixes[origin]}/{paths[origin][position]}" for position in positions],
        }
        import pyarrow as pa

        return ray.data.from_arrow(pa.table(table)).repartition(max(1, min(len(positions) // 64, 256)))

    def read(batch: dict[str, Any]) -> Iterator[_Row]:
        for sample, label, path in zip(batch["sample"], batch["label"], batch["path"], strict=True):
            yield int(sample), int(label), str(path), _reader(filesystem, str(path))

    raw = {split: rows_of(split, positions) for split, (_, positions) in items.items()}
    return _decoded(config, raw, read, class_names, batch_size=64)


def _reader(filesystem: FileSystem, path: str) -> Callable[[], bytes]:
    def read() -> bytes:
        with filesystem.open_input_file(path) as file:
            return bytes(file.read())

    return read


def _inside_splits(listed: dict[str, list[tuple[str, str]]], config: DataConfig) -> dict[str, list[tuple[str, str]]]:
    """What is in class folders of the splits' folders; files beside those are left alone, as in the root."""
    by_split: dict[str, list[tuple[str, str]]] = {}
    for folder, files in listed.items():
        split = _SPLIT_NAMES.get(folder, folder)
        if split in by_split:
            raise DataError(f"data.root={config.root} holds more than one validation folder ({folder}/); keep one")
        by_split[split] = [(path, label) for path, label in files if path != label]
        if not by_split[split]:
            raise DataError(
                f"data.root={config.root}: {folder}/ holds no image in a class folder; {folder}/class/image is "
                f"expected. Without {folder}/, its samples are cut from train/ by data.val_fraction, data.test_fraction"
            )
    return by_split


def _folder_of(listed: dict[str, Any], split: str) -> str:
    return next(name for name in listed if _SPLIT_NAMES.get(name, name) == split)


def _list_images(filesystem: FileSystem, root: str, config: DataConfig) -> dict[str, list[tuple[str, str]]]:
    """{top folder: [(path below it, its first folder)]} of every file that is not hidden."""
    from pyarrow.fs import FileSelector, FileType

    try:
        found = filesystem.get_file_info(FileSelector(root, recursive=True))
    except OSError as error:
        raise DataError(f"data.root={config.root} can't be listed: {error}") from error
    listed: dict[str, list[tuple[str, str]]] = {}
    for info in found:
        parts = PurePosixPath(info.path).relative_to(root).parts
        if info.type == FileType.File and len(parts) > 1 and not any(part.startswith(".") for part in parts):
            listed.setdefault(parts[0], []).append(("/".join(parts[1:]), parts[1]))
    if not listed:
        raise DataError(f"data.root={config.root} holds no image in a class folder: root/class/image is expected")
    return listed


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
    items = _split_items(config, labels)
    image_column, label_column = config.image_column, config.label_column
    numbers = {name: number for number, name in enumerate(class_names)}

    def read(batch: dict[str, Any]) -> Iterator[_Row]:
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
    return _decoded(config, raw, read, class_names, batch_size=1)  # a row group at a time: any may be large


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


def _split_items(config: DataConfig, labels: dict[str, Int64s]) -> dict[str, tuple[str, Int64s]]:
    """{split: (the listed split its samples come from, their positions there)}."""
    missing = [name for name in ("val", "test") if name not in labels]
    fractions = [getattr(config, f"{name}_fraction") for name in missing]
    rest, *cut = stratified_split(labels["train"], fractions, config.split_seed)
    items = {name: (name, np.arange(len(values))) for name, values in labels.items() if name != "train"}
    items |= {name: ("train", part) for name, part in zip(missing, cut, strict=True)}
    return {"train": ("train", rest), **{name: items[name] for name in ("val", "test")}}


def _decoded(
    config: DataConfig,
    raw: dict[str, Any],
    read: Callable[[dict[str, Any]], Iterator[_Row]],
    class_names: list[str],
    batch_size: int,
) -> DataBundle:
    """Decode every split, and deal with what can't be decoded as `data.on_bad_sample` says.

    A task decodes `batch_size` rows of `raw`.
    """
    size, channels = config.image_size, config.channels

    def decode(batch: dict[str, Any]) -> pa.Table:
        rows = list(read(batch))
        images, errors = np.zeros((len(rows), size, size, channels), np.uint8), []
        for row, (_, _, where, get) in enumerate(rows):
            try:
                images[row] = _as_image(get(), size, channels)
                errors.append("")
            except Exception as error:  # whatever a codec raises on bytes from outside; recorded, never dropped
                errors.append(f"{where}\n{type(error).__name__}: {error}")
        return {
            "image": images,
            "label": np.array([row[1] for row in rows], np.int64),
            "sample": np.array([row[0] for row in rows], np.int64),
            "error": np.array(errors),
        }

    decoded = {
        split: dataset.map_batches(decode, batch_size=batch_size).materialize() for split, dataset in raw.items()
    }
    bad: list[BadSample] = []
    sizes: dict[str, int] = {}
    for split, dataset in decoded.items():
        errors = [
            error
            for batch in dataset.select_columns(["error"]).iter_batches(batch_format="numpy")
            for error in batch["error"]
        ]
        wrong = [error for error in errors if error]
        bad += [BadSample(*error.split("\n", 1)) for error in wrong]
        sizes[split] = len(errors) - len(wrong)
        if wrong and config.on_bad_sample == "skip":
            decoded[split] = dataset.map_batches(_only_good, batch_size=None).materialize()
    if bad and config.on_bad_sample == "fail":
        shown = [f"{sample.where}: {sample.reason}" for sample in bad[:_NUM_BAD_SHOWN]]
        more = [f"and {len(bad) - len(shown)} more"] if len(bad) > len(shown) else []
        raise DataError(
            "\n".join(
                [
                    f"{len(bad)} samples can't be read; mend them, or leave them out with data.on_bad_sample=skip:",
                    *shown,
                    *more,
                ]
            )
        )
    return DataBundle(decoded, make_info(config, class_names, sizes, bad_samples=bad))


def _only_good(batch: dict[str, Any]) -> dict[str, Any]:
    good = batch["error"] == ""
    return {name: values[good] for name, values in batch.items()}


def _as_image(value: Any, size: int, channels: int) -> UInt8s:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return decode_image(value, size, channels)
    if value is None:
        raise ValueError("no image")
    pixels = np.asarray(value)
    if pixels.shape == (size, size) and channels == 1:
        pixels = pixels[..., None]
    if pixels.shape != (size, size, channels):
        raise ValueError(f"an array of shape {pixels.shape}, not {(size, size, channels)}")
    if pixels.dtype.kind not in "iu":  # fractions of 1 would all become 0
        raise ValueError(f"pixels of type {pixels.dtype}, not whole numbers from 0 to 255")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("pixel values outside 0..255")
    return pixels.astype(np.uint8)
