"""Predictions on their way to files: parts of fixed size, each written whole, and what they were made of and with.

    predictions.json             the plan: run, checkpoint, images, settings
    bad.csv                      images that can't be read, once everything is done
    parts/part_000000.parquet    samples 0 to part_rows - 1, and so on; or .csv

Part k holds the samples [k * part_rows, (k + 1) * part_rows) whatever was interrupted, so what is missing follows from
the names that are there.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ftexp.config.schema import SINGLE_LABEL
from ftexp.data.info import BadSample
from ftexp.data.order import Int64s
from ftexp.errors import ConfigError, StorageError
from ftexp.predict.answers import AnswerColumns, answers_of, surest_classes
from ftexp.storage.directory import Storage

if TYPE_CHECKING:
    import pyarrow as pa

PLAN_FILE, BAD_FILE, PARTS = "predictions.json", "bad.csv", "parts"
# keys of a plan that may change: a run may be moved, since the hash of its weights shows that they are the same
_FREE = ("run",)
# what plans don't say that were written before it could be chosen
_DATA_OF_BEFORE = {
    **{"crop_pct": None, "crop_mode": "center", "interpolation": "bicubic"},
    **{"task": "single_label", "label_separator": ";", "target_columns": None},
    **{"decoder": "pillow", "exif_orientation": False, "background": None, "bit_depth": 16},
}
# what a message calls them
_TITLES = {"weights_sha256": "the hash of the weights' file", "listing_sha256": "the SHA-256 of the listing"}


@dataclass(frozen=True)
class PredictionPlan:
    """Definition of predictions: data, model and parts."""

    run: str
    checkpoint: str
    weights: str  # raw, or ema
    weights_sha256: str  # SHA-256 of the file that holds them; BLAKE3 in checkpoints of format 3
    data: dict[str, Any]  # name, root and split, and how the images are seen
    num_images: int
    listing_sha256: str  # SHA-256 of paths and file sizes
    top_k: int
    format: str
    part_rows: int
    tta: str = "none"  # or hflip: with mirror images
    thresholds: list[float] | None = None  # thresholds of each class; None: the surest classes are written, or numbers

    @property
    def num_parts(self) -> int:
        """Return the number of files in all."""
        return -(-self.num_images // self.part_rows)

    def samples(self, part: int) -> Int64s:
        """Return the samples of a part."""
        return np.arange(part * self.part_rows, min((part + 1) * self.part_rows, self.num_images))

    def file(self, part: int) -> str:
        """Return the name of a part's file."""
        return f"part_{part:06d}.{self.format}"


def begin(out: Storage, plan: PredictionPlan) -> list[int]:
    """Write the plan, or find it written; returns the parts that are missing.

    ConfigError, with what differs, if the directory holds predictions that were planned otherwise.
    """
    parts = out.child(PARTS)
    written = set(parts.list_files())
    try:
        before = json.loads(out.read_bytes(PLAN_FILE))
    except FileNotFoundError:
        if written:
            raise ConfigError(f"{parts.uri} holds files, but {out.uri} no {PLAN_FILE}: give another out=...") from None
        out.write_bytes(PLAN_FILE, json.dumps(dataclasses.asdict(plan), indent=1).encode())
        return list(range(plan.num_parts))
    _require_same(before, plan, out)
    parts.sweep()  # what was being written when something died
    return [part for part in range(plan.num_parts) if plan.file(part) not in written]


def _require_same(before: dict[str, Any], plan: PredictionPlan, out: Storage) -> None:
    now = json.loads(json.dumps(dataclasses.asdict(plan)))
    for each in (before, now):
        each["data"] = {**_DATA_OF_BEFORE, **each["data"]}
        each.setdefault("tta", "none")
        each.setdefault("thresholds", None)
    changed = [
        f"{_TITLES.get(key, key)} was {before.get(key)!r}, and is {now.get(key)!r} now"
        for key in now
        if before.get(key) != now.get(key) and key not in _FREE
    ]
    if changed:
        hint = (
            f"{out.uri} holds predictions of a different configuration; give another out=..., or restore these values:"
        )
        raise ConfigError("\n".join([hint, *changed]))


def part_table(
    batch: dict[str, Any], class_names: list[str], label_names: list[str], answers: AnswerColumns | None = None
) -> pa.Table:
    """Return rows as they are written: path, what the model says, truth, error; null where there is nothing.

    batch: where, error ("": none), label (-1: not known), and what `answers` reads, by default `surest_classes`.
    """
    import pyarrow as pa

    errors = [" ".join(error.split()) or None for error in batch["error"].tolist()]  # a line each
    bad = np.array([error is not None for error in errors])
    columns: dict[str, pa.Array] = {"path": pa.array(batch["where"].tolist(), pa.string())}
    columns |= (answers or surest_classes)(batch, class_names, bad)
    truths = [label_names[label] if label >= 0 else None for label in batch["label"].tolist()]
    return pa.table({**columns, "truth": pa.array(truths, pa.string()), "error": pa.array(errors, pa.string())})


@dataclass(frozen=True)
class WritePart:
    """A map stage of Ray Data: all rows of one part -> its number, and how many of it are bad."""

    plan: PredictionPlan
    out: Storage
    class_names: list[str]
    label_names: list[str]
    task: str = SINGLE_LABEL

    def __call__(self, batch: dict[str, Any]) -> dict[str, npt.NDArray[np.int64]]:
        """Write the file, whole or not at all."""
        part = int(batch["sample"][0]) // self.plan.part_rows
        if not np.array_equal(batch["sample"], self.plan.samples(part)):
            raise RuntimeError(f"the pipeline returned rows of another part than {part}")
        table = part_table(batch, self.class_names, self.label_names, answers_of(self.plan, self.task))
        content = encoded(table, self.plan.format)
        self.out.child(PARTS).write_bytes(self.plan.file(part), content)
        return {"part": np.array([part]), "num_bad": np.array([np.count_nonzero(batch["error"] != "")])}


def encoded(table: pa.Table, kind: str) -> bytes:
    """Return a table as the content of a parquet or CSV file."""
    stream = io.BytesIO()
    if kind == "csv":
        from pyarrow import csv

        csv.write_csv(table, stream)
    else:
        import pyarrow.parquet as pq

        pq.write_table(table, stream)
    return stream.getvalue()


def collect_bad(plan: PredictionPlan, out: Storage, unlisted: list[BadSample]) -> list[BadSample]:
    """Read back what can't be read, from every part and in their order, and write it to bad.csv if there is any.

    StorageError if a part is missing.
    """
    import pyarrow as pa
    from pyarrow import csv, dataset

    parts = out.child(PARTS)
    missing = {plan.file(part) for part in range(plan.num_parts)} - set(parts.list_files())
    if missing:
        raise StorageError(f"{parts.uri}: {min(missing)} is missing; run the same command to write it again")
    filesystem, root = parts.open()
    files = [f"{root}/{plan.file(part)}" for part in range(plan.num_parts)]
    text = pa.schema([("path", pa.string()), ("error", pa.string())])  # pyarrow would guess from the first rows of CSV
    whole_names = csv.ParseOptions(newlines_in_values=True)
    kind = dataset.CsvFileFormat(parse_options=whole_names) if plan.format == "csv" else dataset.ParquetFileFormat()
    written = dataset.dataset(files, schema=text, filesystem=filesystem, format=kind)
    found = written.to_table(filter=dataset.field("error") != "")
    rows = zip(found["path"].to_pylist(), found["error"].to_pylist(), strict=True)
    bad = [*unlisted, *(BadSample(path, error) for path, error in rows)]
    if bad:
        table = pa.table({"path": [sample.where for sample in bad], "error": [sample.reason for sample in bad]})
        out.write_bytes(BAD_FILE, encoded(table, "csv"))
    return bad
