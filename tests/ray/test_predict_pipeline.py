"""Prediction from images in every layout, with and without labels, to part files; in one Ray."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import timm
import torch

from ftexp.cli.trained_run import SavedRun
from ftexp.cluster.resources import Workers
from ftexp.data.cropping import Fit
from ftexp.data.feeds.decoding import decode_samples
from ftexp.errors import DataError
from ftexp.predict import stopping
from ftexp.predict.inputs import ALL, find_inputs
from ftexp.predict.parts import PARTS, PredictionPlan, begin
from ftexp.storage.directory import Storage
from tests.support.configs import composed
from tests.support.image_files import (
    SIZE,
    data_config,
    encoded,
    picture,
    put,
    write_layouts,
    write_parquet,
    write_shard,
)
from tests.support.processes import wait_until

CLASSES = ["0", "1", "2"]
IMAGES = [picture(seed) for seed in range(20)]
LABELS = [n % 3 for n in range(20)]

pytestmark = pytest.mark.usefixtures("data_ray")


def read(inputs, size=SIZE):
    """Return (pixels, places, reasons, class names) of all samples, in order."""
    pixels, outcome = decode_samples(inputs.split, np.arange(len(inputs.split)), Fit(size, 3))
    _, labels = inputs.split.table.get()
    names = [inputs.label_names[label] if label >= 0 else None for label in labels]
    return pixels, outcome.places, outcome.reasons, names


@pytest.mark.parametrize("layout", ["image_folder", "image_list", "parquet", "webdataset"])
def test_every_labelled_layout_gives_every_image_with_its_class(layout, tmp_path):
    write_layouts(tmp_path, IMAGES, LABELS)
    if layout == "image_list":
        (tmp_path / "image_list").rename(tmp_path / "image_list.csv")
    root = tmp_path / ("image_list.csv" if layout == "image_list" else layout)

    inputs = find_inputs(data_config(layout, root, on_bad_sample="skip"), ALL, CLASSES)

    pixels, places, reasons, names = read(inputs)
    assert reasons == [""] * 20
    assert len(set(places)) == 20
    found = sorted((image.tobytes(), name) for image, name in zip(pixels, names, strict=True))
    assert found == sorted((image.tobytes(), str(label)) for image, label in zip(IMAGES, LABELS, strict=True))


def test_images_without_labels_are_found_in_every_layout(tmp_path):
    content = [encoded(image) for image in IMAGES]
    for number, png in enumerate(content):
        put(tmp_path / "flat" / f"{number:02}.png", png)
    put(tmp_path / "list.csv", "\n".join(["path", *(f"flat/{n:02}.png" for n in range(20))]).encode())
    import pyarrow as pa

    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": content}), tmp_path / "rows" / "a.parquet", row_group_size=7)
    write_shard(tmp_path / "shards" / "a.tar", [(f"{n:02}.png", png) for n, png in enumerate(content)])

    for name, root in (
        ("image_folder", "flat"),
        ("image_list", "list.csv"),
        ("parquet", "rows"),
        ("webdataset", "shards"),
    ):
        inputs = find_inputs(data_config(name, tmp_path / root, on_bad_sample="skip"), ALL, CLASSES)
        pixels, _, reasons, names = read(inputs)
        assert (reasons, names) == ([""] * 20, [None] * 20), name
        assert np.array_equal(pixels, np.stack(IMAGES)), name
        assert inputs.bad == []


def test_a_listing_that_has_changed_has_another_digest(tmp_path):
    def digest():
        return find_inputs(data_config("image_folder", tmp_path), ALL, CLASSES).digest

    put(tmp_path / "a.png", encoded(IMAGES[0]))
    one = digest()
    put(tmp_path / "b.png", encoded(IMAGES[1]))
    two = digest()
    put(tmp_path / "b.png", encoded(IMAGES[1]) + b"more")
    assert len({one, two, digest()}) == 3
    (tmp_path / "b.png").unlink()
    put(tmp_path / "readme.md", b"no image")
    assert digest() == one


@pytest.mark.parametrize(("integer_labels", "named"), [("values", "007"), ("indices", "7")])
def test_labels_are_named_as_training_names_them(tmp_path, integer_labels, named):
    put(tmp_path / "folder" / "007" / "a.png", encoded(IMAGES[0]))
    write_parquet(tmp_path / "rows" / "a.parquet", [encoded(IMAGES[0])], ["007"])
    put(tmp_path / "list.csv", b"path,label\nfolder/007/a.png,007\n")
    write_shard(tmp_path / "shards" / "a.tar", [("a.png", encoded(IMAGES[0])), ("a.cls", b"007")])
    found = {
        name: read(find_inputs(data_config(name, tmp_path / root, integer_labels=integer_labels), ALL, ["007"]))[3]
        for name, root in (
            ("image_folder", "folder"), ("parquet", "rows"), ("image_list", "list.csv"), ("webdataset", "shards"),
        )
    }  # fmt: skip
    assert found == {"image_folder": ["007"], "parquet": ["007"], "image_list": [named], "webdataset": [named]}


def test_a_list_whose_labels_have_changed_has_another_digest(tmp_path):
    put(tmp_path / "a.png", encoded(IMAGES[0]))
    digests = set()
    for label in "01":
        put(tmp_path / "list.csv", f"path,label\na.png,{label}\n".encode())
        digests.add(find_inputs(data_config("image_list", tmp_path / "list.csv"), ALL, CLASSES).digest)
    assert len(digests) == 2


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(DataError, match="has no image for split=all"):
        find_inputs(data_config("image_folder", tmp_path), ALL, CLASSES)


def test_a_parquet_file_that_cannot_be_read_is_named_beside_the_others(tmp_path):
    write_parquet(tmp_path / "good.parquet", [encoded(IMAGES[0])], [0])
    put(tmp_path / "torn.parquet", b"PAR1")

    inputs = find_inputs(data_config("parquet", tmp_path, on_bad_sample="skip"), ALL, CLASSES)

    assert len(inputs.split) == 1
    assert [sample.where for sample in inputs.bad] == [str(tmp_path / "torn.parquet")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run directory of a small model with random weights."""
    config = composed("model=vit", "data=image_folder", "data.root=.", f"data.image_size={SIZE}", "augment=none")
    directory = Storage.at(str(tmp_path_factory.mktemp("run")))
    info = {"name": "image_folder", "class_names": CLASSES, "image_size": SIZE, "channels": 3, "num_samples": {}}
    data = {**info, "mean": [0.5] * 3, "std": [0.25] * 3}
    from omegaconf import OmegaConf

    from ftexp.data.info import DataInfo
    from ftexp.model.build import timm_arguments
    from ftexp.rundir.names import RUN_FILE

    directory.write_bytes("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))).encode())
    arguments = timm_arguments(config.model, DataInfo(**{k: v for k, v in data.items() if k != "name"}))
    record = {"name": "run", "data": data, "model": {"arguments": arguments}}
    directory.write_bytes(RUN_FILE, json.dumps(record).encode())
    return SavedRun.at(directory.uri)


def test_parts_hold_what_the_model_says_of_each_image_and_name_what_is_unreadable(run, tmp_path):
    from ftexp.data.shared import Shared
    from ftexp.predict.pipeline import PredictionJob

    paths = [tmp_path / "images" / f"{'012'[n % 3]}/{n:02}.png" for n in range(20)]
    for path, image in zip(paths, IMAGES, strict=True):
        put(path, encoded(image))
    paths[4].write_bytes(paths[4].read_bytes()[:60])
    put(tmp_path / "images" / "torn.png", b"no image")
    in_order = sorted([*paths, tmp_path / "images" / "torn.png"])
    torch.manual_seed(0)
    model = timm.create_model(**json.loads(run.storage.read_bytes("run.json"))["model"]["arguments"]).eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    weights = Shared(np.frombuffer((tmp_path / "model.pt").read_bytes(), np.uint8))
    out = Storage.at(str(tmp_path / "out"))
    inputs = find_inputs(data_config("image_folder", tmp_path / "images"), ALL, CLASSES)
    plan = PredictionPlan(run.storage.uri, "step", "raw", "", {}, len(inputs.split), inputs.digest, 3, "parquet", 6)
    missing = begin(out, plan)
    assert missing == [0, 1, 2, 3]
    job = PredictionJob(run, weights, inputs, plan, out, Workers(1, False, {"CPU": 0.5}), 1, batch_size=4)

    written = dict(job.write([0, 1, 3]))  # as if a kill had come before part 2

    assert written == {part: sum(path in (paths[4], in_order[-1]) for path in in_order[6 * part : 6 * part + 6])
                       for part in (0, 1, 3)}  # fmt: skip
    assert begin(out, plan) == [2]
    rows = [row for part in (0, 1, 3) for row in pq.read_table(tmp_path / "out" / PARTS / plan.file(part)).to_pylist()]
    assert [row["path"] for row in rows] == [str(path) for path in in_order[:12] + in_order[18:]]
    for row in rows:
        if row["path"] in (str(paths[4]), str(in_order[-1])):
            assert row["error"].startswith(("OSError", "UnidentifiedImageError", "SyntaxError"))
            assert row["label"] is row["probability"] is row["label_3"] is None
            continue
        number = [str(path) for path in paths].index(row["path"])
        with torch.inference_mode():
            images = torch.tensor(IMAGES[number]).permute(2, 0, 1)[None] / 255
            surest = model((images - 0.5) / 0.25).softmax(1)[0].sort(descending=True)
        assert row["truth"] == CLASSES[LABELS[number]]
        assert [row[key] for key in ("label", "label_2", "label_3")] == [CLASSES[n] for n in surest.indices]
        found = [row[key] for key in ("probability", "probability_2", "probability_3")]
        assert found == pytest.approx(surest.values.tolist(), abs=1e-6)


def test_a_pipeline_of_which_nothing_comes_ends_when_it_is_asked_to_and_so_does_the_next(tmp_path, monkeypatch):
    for event in ("_asked", "_running"):
        monkeypatch.setattr(stopping, event, threading.Event())

    def wait_for_ever(batch):
        (tmp_path / "began").touch()
        wait_until((tmp_path / "over").exists)  # Ray doesn't stop a running task, and other tests need its CPU
        return batch

    def results():
        dataset = ray.data.range(1).map_batches(wait_for_ever)
        dataset.context.custom_execution_callback_classes = [stopping.StopWhenAsked]
        return list(dataset.iter_batches())

    with ThreadPoolExecutor(1) as pool:
        assert not stopping.ask_to_stop()  # no pipeline is waiting
        stopping._asked.clear()
        waiting = pool.submit(results)
        wait_until((tmp_path / "began").exists)
        assert stopping.ask_to_stop()
        with pytest.raises(stopping.Stopped):
            waiting.result(timeout=60)
        assert not stopping.ask_to_stop()
        with pytest.raises(stopping.Stopped):
            pool.submit(results).result(timeout=60)
    (tmp_path / "over").touch()
    wait_until(lambda: ray.available_resources().get("CPU", 0) >= ray.cluster_resources()["CPU"])
