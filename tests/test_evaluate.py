"""`python -m ftexp.evaluate`: where its result goes. What it finds is in test_end_to_end.py."""

import json

import pytest
from saved_runs import CHECKPOINT, saved_run

from ftexp.errors import StorageError
from ftexp.evaluate import EvaluateConfig, _evaluate, evaluate
from ftexp.storage import Storage


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    words = [
        "data=synthetic",
        "data.num_samples=60",
        "data.num_classes=3",
        "data.image_size=8",
        "data.test_fraction=0.2",
    ]
    return saved_run(tmp_path_factory.mktemp("run"), *words, "data.test_fraction=0.2")


@pytest.mark.usefixtures("data_ray")
@pytest.mark.parametrize("options", ["", "?endpoint_override=http://here:9000/s3"])
def test_out_is_a_file_in_any_folder(run, memory, options):
    out = f"memory://bucket/told/first.json{options}"
    result = _evaluate(EvaluateConfig(run=run.storage.uri, out=out), run.config, run.storage)
    assert result["written"] == out
    told = json.loads(Storage.at(f"memory://bucket/told{options}").read_bytes("first.json"))
    assert (told["checkpoint"], told["split"], told["num_samples"]) == (CHECKPOINT, "test", 12)
    assert told["accuracy"] == result["accuracy"]
    assert not run.storage.exists("evaluation_test.json")


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_counted(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"out: .*file can't be written: .*Give another out"):
        evaluate(EvaluateConfig(run=run.storage.uri, out=str(tmp_path / "file" / "told.json")))
