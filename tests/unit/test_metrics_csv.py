"""metrics.csv has the content of metrics.jsonl."""

import csv
import json

import pytest

from ftexp.rundir.record import RunRecord
from ftexp.rundir.state import RunState, read_state
from ftexp.storage.directory import Storage
from ftexp.wire.messages import Metrics

SCORE = ("val_accuracy", "max")


def log(record, split, step, **values):
    record.handle(Metrics(split, step, 0, values, time=1.5))


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


def test_a_run_that_goes_on_has_the_points_of_both_invocations(storage):
    record = RunRecord(storage, RunState(name="x"), SCORE)
    log(record, "train", 10, train_loss=1.0)
    record.write()
    assert not storage.exists("metrics.csv")  # it is written at the end of the run
    record.close("interrupted")
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
