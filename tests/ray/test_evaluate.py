"""`python -m ftexp.evaluate`: where it writes its result. tests/command/test_end_to_end.py checks the result itself."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ftexp.checkpoint.reading import read_weights
from ftexp.data.feeds.feed import ToTensors
from ftexp.errors import DataError, StorageError
from ftexp.evaluate import command as module
from ftexp.evaluate.command import EvaluateConfig
from ftexp.evaluate.measure import measure
from ftexp.evaluate.printing import print_result
from ftexp.storage.directory import Storage
from tests.support.configs import composed
from tests.support.image_files import encoded, picture, put
from tests.support.saved_runs import CHECKPOINT, saved_run

pytestmark = pytest.mark.usefixtures("data_ray")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = ["data=synthetic", "data.num_samples=60", "data.num_classes=3", "data.image_size=8"]
    return saved_run(tmp_path_factory.mktemp("run"), *data, "data.test_fraction=0.2")


@pytest.mark.parametrize("options", ["", "?endpoint_override=http://here:9000/s3"])
def test_out_is_a_file_in_any_folder(run, memory, options):
    out = f"memory://bucket/told/first.json{options}"
    asked = EvaluateConfig(run=run.storage.uri, out=out, metrics=["balanced_accuracy"])
    result = measure(asked, run.config, run.storage)
    assert result["written"] == out
    told = json.loads(Storage.at(f"memory://bucket/told{options}").read_bytes("first.json"))
    assert (told["checkpoint"], told["split"], told["num_samples"]) == (CHECKPOINT, "test", 12)
    assert told["accuracy"] == result["accuracy"]
    recalls = [row["recall"] for row in told["classes"] if row["recall"] is not None]
    assert told["metrics"] == {"balanced_accuracy": pytest.approx(sum(recalls) / len(recalls))}
    assert not run.storage.exists("evaluation_test.json")


def test_a_split_without_samples_is_refused_with_those_that_have_some(run):
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, test_fraction=0.0))
    with pytest.raises(DataError, match=r"^split=test has no samples: give split=train or split=val$"):
        measure(EvaluateConfig(run=run.storage.uri), config, run.storage)


def test_weights_are_measured_in_the_precision_they_were_trained_in(run):
    in_bf16 = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, precision="bf16"))
    losses = [measure(EvaluateConfig(run=run.storage.uri), each, run.storage)["loss"] for each in (run.config, in_bf16)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_list_of_test_images_alone_is_evaluated(run, tmp_path):
    rows = ["path,label,split"]
    for seed, name in enumerate(("ant", "cow", "cow")):
        put(tmp_path / "x" / f"{seed}.png", encoded(picture(seed, size=8)))
        rows.append(f"./x/{seed}.png,{name},test")  # the form of `find`'s output
    (tmp_path / "test.csv").write_text("\n".join(rows))
    listed = composed("data=image_list", f"data.root={tmp_path / 'test.csv'}", "augment=none")
    asked = EvaluateConfig(run=run.storage.uri, split="test", metrics=[])
    other = module._on_other_data(run.config, listed, run.storage)
    assert measure(asked, other, run.storage, is_other=True)["num_samples"] == 3


def test_where_the_run_cannot_be_written_the_result_is_told_and_so_is_why(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Storage, "write_bytes", refuse)
    result = measure(EvaluateConfig(run=run.storage.uri), run.config, run.storage)
    print_result({**result, "metrics": {"auroc": 0.5, "top5": None}})
    assert result["num_samples"] == 12
    target = f"{run.storage.uri}/evaluation_test.json"
    advice = f"! not written to {target}: [Errno 30] Read-only file system; add out=<file> for another place"
    printed = capsys.readouterr().out
    assert advice in printed
    assert "auroc 0.5000\ntop5 -\n" in printed
    with pytest.raises(StorageError, match=r"out=.* can't be written: .*Read-only file system"):
        measure(EvaluateConfig(run=run.storage.uri, out="/there/told.json"), run.config, run.storage)


def test_with_tta_the_logits_of_mirror_images_are_averaged_and_the_plain_evaluation_stays(run, capsys):
    plain = measure(EvaluateConfig(run=run.storage.uri), run.config, run.storage)
    result = measure(EvaluateConfig(run=run.storage.uri, tta="hflip"), run.config, run.storage)
    print_result(result)
    assert "on 12 test samples, each with its mirror image (tta=hflip)" in capsys.readouterr().out
    assert result["written"].endswith("/evaluation_test_hflip.json")
    assert json.loads(run.storage.read_bytes("evaluation_test.json"))["loss"] == plain["loss"]
    assert (plain["tta"], result["tta"]) == ("none", "hflip")
    assert result["loss"] != plain["loss"]


def test_other_data_are_counted_by_the_names_of_their_classes(run, tmp_path, capsys):
    names = {"cow": [1, 2, 3], "ant": [4, 5], "dog": [6, 7]}  # the run's classes are ant, bee, cow, in this order
    for name, seeds in names.items():
        for seed in seeds:
            put(tmp_path / "photos" / name / f"{seed}.png", encoded(picture(seed, size=8)))
    photos = composed("data=image_folder", f"data.root={tmp_path / 'photos'}", "augment=none")
    config = EvaluateConfig(run=run.storage.uri)
    other = module._on_other_data(run.config, photos, run.storage)
    result = measure(config, other, run.storage, is_other=True)
    print_result(result)
    assert "new classes, 2 samples excluded: dog (2)" in capsys.readouterr().out
    assert (result["split"], result["num_samples"], result["written"]) == (
        "all", 5, f"{run.storage.uri}/evaluation_photos_all.json",
    )  # fmt: skip
    assert (result["missing_classes"], result["new_classes"]) == (["bee"], {"dog": 2})
    assert [(row["class"], row["num_samples"]) for row in result["classes"]] == [("ant", 2), ("cow", 3)]
    model = run.model(read_weights(run.store, run.store.by_name(CHECKPOINT), "raw"))
    pixels = np.stack([picture(seed, size=8) for seed in (4, 5, 1, 2, 3)])
    labels = torch.tensor([0, 0, 2, 2, 2])
    with torch.inference_mode():
        logits = model(ToTensors(run.info, torch.device("cpu"), False)(pixels))
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["accuracy"] == (logits.argmax(1) == labels).sum().item() / 5
