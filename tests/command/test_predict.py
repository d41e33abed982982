"""`python -m ftexp.predict`: killed and interrupted half-way, and with wrong overrides."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from ftexp.errors import ConfigError
from ftexp.predict.command import parse
from ftexp.predict.parts import PARTS

# the digits as a source in which images after a certain one are blocked until a file exists: this holds a command
# half-way for as long as needed
GATED = """
import functools
from pathlib import Path
import numpy as np
from ftexp.data.listing import Listing
from ftexp.data.sources.registry import sources
from tests.support.processes import wait_until

class Reader:
    def __init__(self, folder):
        self.folder, self.images = Path(folder), None

    def __call__(self, items):
        if self.images is None:
            self.images = np.load(self.folder / "images.npy")
        for item in items.tolist():
            yield f"digit {item}", functools.partial(self.read, item)

    def read(self, item):
        for gate in (600, 1200):
            wait_until(lambda: item <= gate or (self.folder / f"open_{gate}").exists())
        return self.images[item]

@sources.register("gated")
def gated(config):
    reader = Reader(config.kwargs["folder"])
    labels = np.load(reader.folder / "labels.npy")
    return Listing([str(digit) for digit in range(10)], {"train": labels}, {"train": reader})
"""


def test_a_command_interrupted_and_killed_goes_on_and_agrees_with_the_evaluation(clean_run, ftexp, tmp_path):
    (tmp_path / "gated_digits.py").write_text(GATED)
    digits = load_digits()
    images = np.round(digits.images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)  # importing scikit-learn would take every reading process a second or two
    np.save(tmp_path / "labels.npy", digits.target.astype(np.int64))
    out, parts = tmp_path / "out", tmp_path / "out" / PARTS
    words = [f"run={clean_run.path}", "checkpoint=latest", f"out={out}", "predict.part_rows=40", "predict.top_k=3"]
    words += ["data.name=gated", f"data.kwargs.folder={tmp_path}", "plugins=[gated_digits]"]

    def written():
        return {path.name: path.stat().st_mtime_ns for path in parts.glob("part_*")}

    interrupted = ftexp(*words, module="predict")
    interrupted.wait_until(lambda: len(written()) == 3)  # all parts before the first gate: none is being written
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.wait() == 130, interrupted.output
    assert "Traceback" not in interrupted.output
    first = written()
    (tmp_path / "open_600").touch()
    killed = ftexp(*words, module="predict", own_ray=False)
    killed.wait_until(lambda: len(written()) == 6)  # all parts before the second gate
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.wait()
    second = written()
    (tmp_path / "open_1200").touch()
    last = ftexp(*words, module="predict", own_ray=False)
    assert last.wait() == 0, last.output

    assert f"{len(first)} of 9 parts are written already" in killed.output
    assert f"{len(second)} of 9 parts are written already" in last.output
    assert second.items() <= written().items()  # their files were not touched again
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
