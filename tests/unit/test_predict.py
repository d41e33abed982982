"""`python -m ftexp.predict`: the command killed and interrupted half-way, and what doesn't need Ray."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from ftexp.config.schema import Config, ModelConfig
from ftexp.data.stratify import DataInfo
from ftexp.errors import ConfigError, StorageError
from ftexp.predict import parse, refuse
from ftexp.predicting.parts import BAD_FILE, PARTS, PLAN_FILE, Plan, WritePart, begin, collect_bad, encoded, part_table
from ftexp.predicting.pipeline import Predict
from ftexp.predicting.progress import ImageProgress
from ftexp.storage.directory import Storage

PLAN = Plan("run", "step_1", "raw", "abc", {"name": "image_folder", "root": "/a"}, 10, "def", 2, "parquet", 4)
# the digits as a source whose images past a certain one can't be read until a file is there: a command stands still
# then, half-way, for as long as it takes
GATED = """
import functools, time
from pathlib import Path
import numpy as np
from sklearn.datasets import load_digits
from ftexp.data.listing import Listing
from ftexp.data.sources.arrays import sources

class Reader:
    def __init__(self, folder):
        self.folder, self.images = Path(folder), None

    def __call__(self, items):
        if self.images is None:
            self.images = np.round(load_digits().images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        for item in items.tolist():
            yield f"digit {item}", functools.partial(self.read, item)

    def read(self, item):
        for gate in (600, 1200):
            while item > gate and not (self.folder / f"open_{gate}").exists():
                time.sleep(0.02)
        return self.images[item]

@sources.register("gated")
def gated(config):
    labels = load_digits().target.astype(np.int64)
    return Listing([str(digit) for digit in range(10)], {"train": labels}, {"train": Reader(config.kwargs["folder"])})
"""


def test_a_command_interrupted_and_killed_goes_on_and_agrees_with_the_evaluation(clean_run, ftexp, tmp_path):
    (tmp_path / "gated_digits.py").write_text(GATED)
    out, parts = tmp_path / "out", tmp_path / "out" / PARTS
    words = [f"run={clean_run.path}", "checkpoint=latest", f"out={out}", "predict.part_rows=40", "predict.top_k=3"]
    words += ["data.name=gated", f"data.kwargs.folder={tmp_path}", "plugins=[gated_digits]"]

    def written():
        return {path.name: path.stat().st_mtime_ns for path in parts.glob("part_*")}

    interrupted = ftexp(*words, module="predict")
    interrupted.wait_until(lambda: len(written()) == 3)  # all before the first gate: none is under way
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.wait() == 130, interrupted.output
    assert "Traceback" not in interrupted.output
    first = written()
    (tmp_path / "open_600").touch()
    killed = ftexp(*words, module="predict")
    killed.wait_until(lambda: len(written()) == 6)  # as many before the second
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.wait()
    second = written()
    (tmp_path / "open_1200").touch()
    last = ftexp(*words, module="predict")
    assert last.wait() == 0, last.output

    assert f"{len(first)} of 9 parts are written already" in killed.output
    assert f"{len(second)} of 9 parts are written already" in last.output
    assert second.items() <= written().items()  # not touched again
    assert first.items() <= second.items()
    assert not list(parts.glob(".tmp*"))
    tables = [pq.read_table(parts / f"part_{part:06d}.parquet") for part in range(9)]
    assert [len(table) for table in tables] == [40] * 9
    rows = pa.concat_tables(tables).to_pylist()
    numbers = [int(row["path"].removeprefix("digit ")) for row in rows]
    assert numbers == sorted(set(numbers))
    assert all(row["error"] is None and row["probability"] >= row["probability_2"] for row in rows)
    evaluation = json.loads((clean_run.path / "evaluation_test.json").read_text())
    counted = Counter((int(row["truth"]), int(row["label"])) for row in rows)
    assert evaluation["confusion"] == [[counted[label, guess] for guess in range(10)] for label in range(10)]


def run_predict(*words):
    command = [sys.executable, "-m", "ftexp.predict", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_help_tells_every_key():
    code, output = run_predict("--help")

    assert code == 0
    for key in ("run ", "checkpoint ", "split ", "out ", "predict.top_k ", "predict.format ", "predict.part_rows "):
        assert f"\n{key}" in output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "run is not set"),
        (["run=nowhere"], "holds no config.yaml"),
        (["run=x", "predict.topk=3"], "Did you mean 'predict.top_k'?"),
        (["run=x", "predict.format=json"], "predict.format='json' is not one of parquet, csv"),
        (["run=x", "split=tset"], "Did you mean 'test'?"),
        (["run=x", "predict.part_rows=0"], "must be at least 1"),
    ],
)
def test_a_wrong_command_is_told_in_a_message(words, told, tmp_path):
    if words == ["run=nowhere"]:
        code, output = run_predict(f"run={tmp_path}")
        assert code == 2
    else:
        with pytest.raises(ConfigError) as caught:
            parse(words)
        output = str(caught.value)
    assert told in output


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.image_size=64", "the model was trained on such images"),
        ("data.on_bad_sample=fail", "is for training"),
        ("data.feed=cached", "is for training"),
        ("scaling.backend=gloo", "of scaling, give num_workers"),
        ("train.epochs=3", "is not read: give run, checkpoint"),
        ("-m", "this is one job"),
    ],
)
def test_what_would_not_be_read_is_refused(word, told):
    with pytest.raises(ConfigError, match=told):
        refuse(["data=image_folder", "scaling.num_workers=1", word])


def test_the_last_part_is_short_and_no_sample_is_in_two():
    samples = [PLAN.samples(part).tolist() for part in range(PLAN.num_parts)]

    assert samples == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert PLAN.file(2) == "part_000002.parquet"


def test_what_is_missing_follows_from_the_names_that_are_there(tmp_path):
    out = Storage.at(str(tmp_path))

    assert begin(out, PLAN) == [0, 1, 2]
    out.child(PARTS).write_bytes(PLAN.file(1), b"whole")
    torn = tmp_path / PARTS / f".tmp-{PLAN.file(0)}"
    torn.write_bytes(b"half")
    assert begin(out, PLAN) == [0, 2]
    assert not torn.exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"listing_sha256": "xyz"}, "the SHA-256 of the listing was 'def', and is 'xyz' now"),
        ({"num_images": 11}, "num_images was 10, and is 11 now"),
        ({"checkpoint": "step_2", "weights_sha256": "b"}, "checkpoint was 'step_1', and is 'step_2' now"),
        ({"weights": "ema"}, "weights was 'raw', and is 'ema' now"),
        ({"top_k": 3}, "top_k was 2, and is 3 now"),
        ({"format": "csv"}, "format was 'parquet', and is 'csv' now"),
    ],
)
def test_a_folder_of_other_predictions_is_refused_and_left_as_it_was(change, told, tmp_path):
    out = Storage.at(str(tmp_path))
    begin(out, PLAN)
    before = (tmp_path / PLAN_FILE).read_bytes()

    with pytest.raises(ConfigError, match="give another out") as caught:
        begin(out, Plan(**{**vars(PLAN), **change}))
    assert told in str(caught.value)
    assert (tmp_path / PLAN_FILE).read_bytes() == before


def test_a_run_that_was_moved_goes_on(tmp_path):
    out = Storage.at(str(tmp_path))
    begin(out, PLAN)

    assert begin(out, Plan(**{**vars(PLAN), "run": "elsewhere"})) == [0, 1, 2]


def test_part_files_without_a_plan_are_nobody_s(tmp_path):
    Storage.at(str(tmp_path), PARTS).write_bytes(PLAN.file(0), b"")

    with pytest.raises(ConfigError, match=f"no {PLAN_FILE}"):
        begin(Storage.at(str(tmp_path)), PLAN)


def rows(samples, errors=None):
    """What the model's stage hands on for `samples`: of three classes, the one of the sample's number is surest."""
    count = len(samples)
    return {
        "sample": np.array(samples),
        "where": np.array([f'/a/{n}, "q".jpg' for n in samples], object),
        "error": np.array(errors or [""] * count, object),
        "label": np.array([n % 3 - 1 for n in samples]),
        "classes": np.array([[n % 3, (n + 1) % 3] for n in samples]),
        "probabilities": np.array([[0.75, 0.25]] * count, np.float32),
    }


def test_a_row_tells_path_classes_truth_and_error():
    table = part_table(rows([0, 1, 2], ["", "OSError: torn", ""]), ["ant", "bee", "cow"], ["ant", "bee"])

    good, bad, last = table.to_pylist()
    assert good == {
        "path": '/a/0, "q".jpg', "label": "ant", "probability": 0.75, "label_2": "bee", "probability_2": 0.25,
        "truth": None, "error": None,
    }  # fmt: skip
    assert bad == {**dict.fromkeys(good), "path": '/a/1, "q".jpg', "truth": "ant", "error": "OSError: torn"}
    assert (last["label"], last["label_2"], last["truth"]) == ("cow", "ant", "bee")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_bad_images_are_read_back_from_all_parts_in_order(kind, tmp_path):
    out, plan = Storage.at(str(tmp_path)), Plan(**{**vars(PLAN), "format": kind})
    write = WritePart(plan, out, ["ant", "bee", "cow"], ["ant", "bee"])

    told = [
        write(rows([8, 9], ["", "B: two\nlines"])),
        write(rows([0, 1, 2, 3])),
        write(rows([4, 5, 6, 7], ["A: x"] * 4)),
    ]

    assert [(int(t["part"][0]), int(t["num_bad"][0])) for t in told] == [(2, 1), (0, 0), (1, 4)]
    bad = collect_bad(plan, out, [])
    assert [(sample.where[3], sample.reason) for sample in bad] == [
        *((n, "A: x") for n in "4567"), ("9", "B: two lines"),
    ]  # fmt: skip
    assert pyarrow.csv.read_csv(tmp_path / BAD_FILE)["error"].to_pylist() == ["A: x"] * 4 + ["B: two lines"]


def test_without_bad_images_there_is_no_list_of_them(tmp_path):
    out, plan = Storage.at(str(tmp_path)), Plan(**{**vars(PLAN), "num_images": 4})
    WritePart(plan, out, ["ant", "bee", "cow"], ["ant", "bee"])(rows([0, 1, 2, 3]))

    assert collect_bad(plan, out, []) == []
    assert not (tmp_path / BAD_FILE).exists()


def test_a_part_that_has_vanished_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"part_000000\.parquet has vanished"):
        collect_bad(PLAN, Storage.at(str(tmp_path)), [])


@pytest.mark.parametrize("samples", [[0, 1, 2], [1, 2, 3, 4], [3, 2, 1, 0]])
def test_a_part_is_written_only_of_its_own_rows(samples, tmp_path):
    write = WritePart(PLAN, Storage.at(str(tmp_path)), ["ant", "bee", "cow"], ["ant", "bee"])

    with pytest.raises(RuntimeError, match="other rows than those of part 0"):
        write(rows(samples))
    assert not list(tmp_path.rglob("part_*"))


def test_a_part_in_an_object_store_is_written_by_one_call(memory):
    out = Storage.at(memory)
    WritePart(PLAN, out, ["ant", "bee", "cow"], ["ant", "bee"])(rows([8, 9]))

    assert out.child(PARTS).list_files() == [PLAN.file(2)]
    assert out.child(PARTS).read_bytes(PLAN.file(2)) == encoded(
        part_table(rows([8, 9]), ["ant", "bee", "cow"], ["ant", "bee"]), "parquet"
    )


def test_progress_tells_rate_and_time_left(monkeypatch):
    from rich.console import Console

    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Console(width=100).capture() as _, ImageProgress(Console(), 1000) as progress:
        now[0] = 2.0
        progress.advance(200)
        assert str(progress) == "200/1,000 images  100 images/s  8 s left"


def test_a_model_that_returns_a_tuple_is_refused_with_its_first_images():
    class Twice(torch.nn.Module):
        def forward(self, images):
            return images, images

    info = DataInfo(["a", "b"], 8, 1, [0.5], [0.5], {})
    run = SimpleNamespace(model=lambda _: Twice(), config=Config(model=ModelConfig(name="mine")), info=info)
    threads = torch.get_num_threads()
    weights = SimpleNamespace(get=lambda: np.zeros(1, np.uint8))
    actor = Predict(run, weights, top_k=1, batch_size=2, use_gpu=False, num_threads=threads)
    with pytest.raises(ConfigError, match=r"^model\.name=mine returns a tuple of 2, not logits of shape \[images, 2\]"):
        actor({"image": np.zeros((2, 8, 8, 1), np.uint8), "error": np.array(["", ""])})
