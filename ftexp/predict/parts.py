"""Files of predictions: parts of fixed size, each written atomically, and the plan that defines them.

    predictions.json             the plan: run, checkpoint, images, settings
    bad.csv                      images that can't be read, written at the end
    parts/part_000000.parquet    samples 0 to part_rows - 1, and so on; or .csv

Part k holds the samples [k * part_rows, (k + 1) * part_rows), whatever was interrupted. So the existing files show
which parts are missing.
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
# values of fields that older plans don't have
_DATA_OF_BEFORE = {
    **{"crop_pct": None, "crop_mode": "center", "interpolation": "bicubic"},
    **{"task": "single_label", "label_separator": ";", "target_columns": None},
    **{"decoder": "pillow", "exif_orientation": False, "background": None, "bit_depth": 16},
}
# names of fields in messages
_TITLES = {"weights_sha256": "the hash of the weights' file", "listing_sha256": "the SHA-256 of the listing"}


@dataclass(frozen=True)
class PredictionPlan:
    """Definition of predictions: data, model and parts."""

    run: str
    checkpoint: str
    weights: str  # raw, or ema
    weights_sha256: str  # SHA-256 of the weights' file; BLAKE3 in checkpoints of format 3
    data: dict[str, Any]  # name, root, split, and preparation of the images
    num_images: int
    listing_sha256: str  # SHA-256 of paths and file sizes
    top_k: int
    format: str
    part_rows: int
    tta: str = "none"  # or hflip: with mirror images
    thresholds: list[float] | None = None  # threshold of each class, for multi_label; None for other tasks

    @property
    def num_parts(self) -> int:
        """Total number of files."""
        return -(-self.num_images // self.part_rows)

    def samples(self, part: int) -> Int64s:
        """Return the samples of a part."""
        return np.arange(part * self.part_rows, min((part + 1) * self.part_rows, self.num_images))

    def file(self, part: int) -> str:
        """Return the name of a part's file."""
        return f"part_{part:06d}.{self.format}"


def begin(out: Storage, plan: PredictionPlan) -> list[int]:
    """Write the plan, or check it against the one in the directory; return the missing parts.

    ConfigError, with the differences, if the directory holds predictions of another plan.
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
    parts.sweep()  # remove files that a dead process left unfinished
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
    """Return the rows to write: path, the model's answers, truth, error; null for missing values.

    batch: where, error ("": none), label (-1: unknown), and the columns that `answers` reads.
    answers: makes the columns of the model's answers; None: `surest_classes`.
    """
    import pyarrow as pa

    errors = [" ".join(error.split()) or None for error in batch["error"].tolist()]  # in one line each
    bad = np.array([error is not None for error in errors])
    columns: dict[str, pa.Array] = {"path": pa.array(batch["where"].tolist(), pa.string())}
    columns |= (answers or surest_classes)(batch, class_names, bad)
    truths = [label_names[label] if label >= 0 else None for label in batch["label"].tolist()]
    return pa.table({**columns, "truth": pa.array(truths, pa.string()), "error": pa.array(errors, pa.string())})


@dataclass(frozen=True)
class WritePart:
    """A map stage of Ray Data: all rows of one part -> the part's number, and the number of its bad rows."""

    plan: PredictionPlan
    out: Storage
    class_names: list[str]
    label_names: list[str]
    task: str = SINGLE_LABEL

    def __call__(self, batch: dict[str, Any]) -> dict[str, npt.NDArray[np.int64]]:
        """Write the file, atomically."""
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
    """Collect the images that can't be read from all parts, in order, and write them to bad.csv if there are any.

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
