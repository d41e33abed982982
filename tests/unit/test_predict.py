"""`python -m ftexp.predict`: the parts that don't need Ray."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.csv
import pytest
import torch

from ftexp.cli.trained_run import SavedRun
from ftexp.config.schema import Config, DataConfig, ModelConfig
from ftexp.data.info import DataInfo
from ftexp.errors import ConfigError, DataError, StorageError
from ftexp.predict.command import PredictConfig, _default_out, predict, refuse
from ftexp.predict.parts import (
    BAD_FILE,
    PARTS,
    PLAN_FILE,
    PredictionPlan,
    WritePart,
    begin,
    collect_bad,
    encoded,
    part_table,
)
from ftexp.predict.pipeline import Predict
from ftexp.predict.progress import ImageProgress
from ftexp.predict.run import _as_array
from ftexp.storage.directory import Storage
from tests.support.configs import composed
from tests.support.saved_runs import saved_run

PLAN = PredictionPlan("run", "step_1", "raw", "abc", {"name": "image_folder", "root": "/a"}, 10, "def", 2, "parquet", 4)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.image_size=64", "set by the trained run"),
        ("data.decoder=pillow", "set by the trained run"),
        ("data.crop_pct=0.9", "set by the trained run"),
        ("data.on_bad_sample=fail", "is used only in training"),
        ("data.feed=cached", "is used only in training"),
        ("scaling.backend=gloo", "of scaling, choose from num_workers"),
        ("train.epochs=3", "is not used: choose from run, checkpoint"),
        ("-m", "predict runs one job"),
    ],
)
def test_what_would_not_be_read_is_refused(word, told):
    with pytest.raises(ConfigError, match=told):
        refuse(["data=image_folder", "scaling.num_workers=1", word])


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (True, DataError, "/photos does not exist$"),
        (False, ConfigError, "/photos, the run's data, does not exist: add data.root="),
    ],
)
def test_data_that_are_not_there_are_noticed_before_ray_starts(tmp_path, monkeypatch, chosen, error, message):
    words = ["data=image_folder", f"data.root={tmp_path}/photos", "data.image_size=8"]
    run = saved_run(tmp_path / "run", *words)
    monkeypatch.setattr("ftexp.cluster.ray_cluster.prepare_environment", lambda _: pytest.fail("Ray is next"))
    with pytest.raises(error, match=rf"^data\.root={tmp_path}{message}"):
        predict(composed("augment=none", *words), PredictConfig(run=run.storage.uri), run, chosen, words)


@pytest.mark.parametrize(("name", "exif"), [("digits", False), ("image_folder", True)])
def test_data_of_any_source_is_decoded_as_the_run_was_if_at_all_and_nothing_is_cut_out(name, exif):
    trained = DataConfig(name="image_folder", image_size=64, decode_size=96, exif_orientation=True)
    info = DataInfo(["cat", "dog"], 64, 3, [0.5] * 3, [0.5] * 3, {"train": 10}, integer_labels="values")
    run = SavedRun(Storage("/runs/first"), Config(data=trained), info)

    seen = run.data_as_seen(DataConfig(name=name, decode_size=32))

    assert (seen.name, seen.image_size, seen.integer_labels) == (name, 64, "values")
    assert (seen.decode_size, seen.exif_orientation) == (None, exif)


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
        ({"tta": "hflip"}, "tta was 'none', and is 'hflip' now"),
    ],
)
def test_a_folder_of_other_predictions_is_refused_and_left_as_it_was(change, told, tmp_path):
    out = Storage.at(str(tmp_path))
    begin(out, PLAN)
    before = (tmp_path / PLAN_FILE).read_bytes()

    with pytest.raises(ConfigError, match="give another out") as caught:
        begin(out, PredictionPlan(**{**vars(PLAN), **change}))
    assert told in str(caught.value)
    assert (tmp_path / PLAN_FILE).read_bytes() == before


def test_a_run_that_was_moved_goes_on(tmp_path):
    out = Storage.at(str(tmp_path))
    begin(out, PLAN)

    assert begin(out, PredictionPlan(**{**vars(PLAN), "run": "elsewhere"})) == [0, 1, 2]


def test_predictions_from_before_crop_and_decoder_could_be_chosen_go_on_if_they_are_as_they_were(tmp_path):
    out, before = Storage.at(str(tmp_path)), {"crop_pct": None, "crop_mode": "center", "interpolation": "bicubic"}
    before |= {"decoder": "pillow", "exif_orientation": False, "background": None, "bit_depth": 16}
    begin(out, PLAN)

    assert begin(out, PredictionPlan(**{**vars(PLAN), "data": {**PLAN.data, **before}})) == [0, 1, 2]
    with pytest.raises(ConfigError, match="give another out"):
        begin(out, PredictionPlan(**{**vars(PLAN), "data": {**PLAN.data, **before, "crop_pct": 0.9}}))


def test_part_files_without_a_plan_are_nobody_s(tmp_path):
    Storage.at(str(tmp_path), PARTS).write_bytes(PLAN.file(0), b"")

    with pytest.raises(ConfigError, match=f"no {PLAN_FILE}"):
        begin(Storage.at(str(tmp_path)), PLAN)


def rows(samples, errors=None):
    """Return the model stage's output for `samples`; sample n has class n % 3 of three as its top prediction."""
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
    out, plan = Storage.at(str(tmp_path)), PredictionPlan(**{**vars(PLAN), "format": kind})
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
    out, plan = Storage.at(str(tmp_path)), PredictionPlan(**{**vars(PLAN), "num_images": 4})
    WritePart(plan, out, ["ant", "bee", "cow"], ["ant", "bee"])(rows([0, 1, 2, 3]))

    assert collect_bad(plan, out, []) == []
    assert not (tmp_path / BAD_FILE).exists()


def test_a_part_that_has_vanished_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"part_000000\.parquet is missing"):
        collect_bad(PLAN, Storage.at(str(tmp_path)), [])


@pytest.mark.parametrize("samples", [[0, 1, 2], [1, 2, 3, 4], [3, 2, 1, 0]])
def test_a_part_is_written_only_of_its_own_rows(samples, tmp_path):
    write = WritePart(PLAN, Storage.at(str(tmp_path)), ["ant", "bee", "cow"], ["ant", "bee"])

    with pytest.raises(RuntimeError, match="rows of another part than 0"):
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
    weights = SimpleNamespace(get=lambda: _as_array({}))
    actor = Predict(run, weights, top_k=1, batch_size=2, use_gpu=False, num_threads=threads)
    with pytest.raises(ConfigError, match=r"^model\.name=mine returns a tuple of 2, not logits of shape \[images, 2\]"):
        actor({"image": np.zeros((2, 8, 8, 1), np.uint8), "error": np.array(["", ""])})


def test_a_plan_that_was_written_before_there_was_tta_goes_on_without(tmp_path):
    out = Storage.at(str(tmp_path))
    before = {key: value for key, value in vars(PLAN).items() if key != "tta"}
    out.write_bytes(PLAN_FILE, json.dumps(before).encode())
    assert begin(out, PLAN) == [0, 1, 2]
    with pytest.raises(ConfigError, match="tta was 'none', and is 'hflip' now"):
        begin(out, PredictionPlan(**{**vars(PLAN), "tta": "hflip"}))


@pytest.mark.parametrize("tta", ["none", "hflip"])
def test_the_logits_of_mirror_images_are_averaged_with_tta(tta):
    class Left(torch.nn.Module):
        def forward(self, images):  # the logits of the classes are the pixels of the left column
            return images[:, 0, :, 0]

    info = DataInfo(["a", "b"], 2, 1, [0.0], [1.0], {})
    run = SimpleNamespace(model=lambda _: Left(), config=Config(model=ModelConfig(name="mine")), info=info)
    weights = SimpleNamespace(get=lambda: _as_array({}))
    actor = Predict(run, weights, 2, batch_size=2, use_gpu=False, num_threads=torch.get_num_threads(), tta=tta)
    pixels = np.array([[[[0], [255]], [[51], [102]]]], np.uint8)
    left, right = torch.tensor([0.0, 0.2]), torch.tensor([1.0, 0.4])
    surest = ((left + right) / 2 if tta == "hflip" else left).softmax(0).sort(descending=True)
    found = actor({"image": pixels, "error": np.array([""])})
    assert found["classes"].tolist() == [surest.indices.tolist()]
    assert found["probabilities"][0] == pytest.approx(surest.values.tolist(), abs=1e-6)


def test_predictions_with_tta_lie_beside_those_without():
    storage = Storage.at("/runs/first")
    data = DataConfig(name="image_folder", root="photos")
    for own, name in (({}, "photos"), ({"tta": "hflip"}, "photos_hflip"),
                      ({"weights": "ema", "tta": "hflip"}, "photos_ema_hflip")):  # fmt: skip
        out = _default_out(SimpleNamespace(storage=storage), data, "all", PredictConfig(run="x", **own))
        assert out.name == name
