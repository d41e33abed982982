"""metrics.csv says what metrics.jsonl says."""

import csv
import json

import pytest

from ftexp.rundir.record import RunRecord, RunState, read_state
from ftexp.storage.directory import Storage

SCORE = ("val_accuracy", "max")


def log(record, split, step, **values):
    record.handle({"kind": "metrics", "split": split, "step": step, "epoch": 0, "time": 1.5, "values": values})


def as_table(storage):
    with storage.local_path.joinpath("metrics.csv").open() as file:
        return list(csv.DictReader(file))


def expected(storage):
    points = [json.loads(line) for line in storage.read_bytes("metrics.jsonl").decode().splitlines()]
    columns = dict.fromkeys(name for point in points for name in point)
    return [{name: "" if (v := point.get(name)) is None else str(v) for name in columns} for point in points]


@pytest.fixture
def storage(tmp_path):
    return Storage.at(str(tmp_path / "run"))


def test_the_table_has_every_point_once_and_a_column_for_every_metric(storage):
    record = RunRecord(storage, RunState(name="x"), SCORE)
    for step in (10, 20, 10):
        log(record, "train", step, train_loss=0.1 * step, lr=1e-5)
    log(record, "val", 20, val_loss=float("nan"))
    log(record, "train", 30, train_loss=3.0, lr=1e-5)
    record.close("interrupted")
    assert as_table(storage) == expected(storage)
    assert [row["step"] for row in as_table(storage)] == ["10", "20", "20", "30"]


def test_rows_are_there_while_the_run_goes_on(storage):
    record = RunRecord(storage, RunState(name="x"), SCORE)
    log(record, "train", 10, train_loss=1.0)
    record.write()
    log(record, "train", 20, train_loss=2.0)  # no new metric: at once
    assert as_table(storage) == expected(storage)
    log(record, "val", 20, val_loss=2.0)
    log(record, "train", 30, train_loss=3.0)
    record.write()
    assert as_table(storage) == expected(storage)
    assert len(as_table(storage)) == 4
    record.close("finished")


def test_a_torn_or_missing_table_is_made_anew(storage):
    record = RunRecord(storage, RunState(name="x"), SCORE)
    log(record, "train", 10, train_loss=1.0)
    record.close("interrupted")
    path = storage.local_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-5])
    again = RunRecord(storage, read_state(storage), SCORE)
    log(again, "train", 20, train_loss=2.0)
    again.close("finished")
    assert as_table(storage) == expected(storage)
    assert len(as_table(storage)) == 2


def test_on_an_object_store_too(memory):
    storage = Storage(memory)
    record = RunRecord(storage, RunState(name="x"), SCORE)
    log(record, "train", 10, train_loss=1.0)
    log(record, "val", 10, val_loss=1.0)
    record.close("finished")
    rows = storage.read_bytes("metrics.csv").decode().splitlines()
    assert rows == ["time,split,step,epoch,train_loss,val_loss", "1.5,train,10,0,1.0,", "1.5,val,10,0,,1.0"]
