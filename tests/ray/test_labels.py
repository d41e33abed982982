"""Labels read by the sources."""

import json

import numpy as np
import pytest
import torch

from ftexp.config.schema import MULTI_LABEL, AugmentConfig
from ftexp.data.build import build_data
from ftexp.data.feeds.feed import CachedRows, ToTensors, read
from ftexp.data.feeds.streamed import StreamedRows
from ftexp.data.targets import unpacked
from tests.support.image_files import data_config, encoded, picture, put, tar_sample, write_parquet, write_shard


@pytest.mark.usefixtures("data_ray")
def test_the_sources_agree_on_classes_and_remember_how_they_were_found(tmp_path):
    pictures = [encoded(picture(number)) for number in range(6)]
    labels = [100001, 5, 100001, 5, 7, 7]
    write_parquet(tmp_path / "rows" / "a.parquet", pictures, labels)
    for number, image in enumerate(pictures):
        put(tmp_path / f"{number}.png", image)
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    put(tmp_path / "list.csv", f"path,label\n{rows}".encode())
    entries = [entry for n, label in enumerate(labels) for entry in tar_sample(f"{n}", picture(n), label)]
    write_shard(tmp_path / "shards" / "a.tar", entries)
    for name, root in (("parquet", "rows"), ("image_list", "list.csv"), ("webdataset", "shards")):
        streaming = {"feed": "streaming", "shuffle_window": 2 if name == "parquet" else None}
        info = build_data(data_config(name, tmp_path / root, val_fraction=0, test_fraction=0, **streaming)).info
        assert (info.class_names, info.integer_labels) == (["5", "7", "100001"], "values")
        info = build_data(data_config(name, tmp_path / root, num_classes=10, **streaming)).info
        assert info.class_names == ["5", "7", "100001", *(f"class_{number}" for number in range(3, 10))]


def directory(root):
    found = (("train", "digit2", 0), ("train", "digit3", 1), ("val", "Digit2", 2), ("test", "digit3", 3))
    for split, label, number in found:
        put(root / split / label / f"{number}.png", encoded(picture(number)))


@pytest.mark.usefixtures("data_ray")
@pytest.mark.parametrize("feed", ["cached", "streaming"])
def test_either_feed_tells_of_classes_that_differ_between_splits(tmp_path, feed):
    directory(tmp_path)
    assert build_data(data_config("image_folder", tmp_path, feed=feed)).info.warnings == [
        "1 of the 1 samples of val have a class without a training sample, so each counts as wrong: 'Digit2' (1)",
        "classes whose names differ in case or Unicode form only: 'Digit2' and 'digit2'",
    ]


@pytest.mark.usefixtures("data_ray")
def test_the_sources_agree_on_sets_of_classes_in_both_feeds(tmp_path):
    pictures = [encoded(picture(number)) for number in range(6)]
    sets = [["b", "a"], [], ["c"], ["a"], ["b"], ["a", "b", "c"]]
    expected = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]
    write_parquet(tmp_path / "rows" / "a.parquet", pictures, sets)
    for number, image in enumerate(pictures):
        put(tmp_path / f"{number}.png", image)
    rows = "".join(f"{number}.png,{';'.join(labels)}\n" for number, labels in enumerate(sets))
    put(tmp_path / "list.csv", f"path,label\n{rows}".encode())
    entries = []
    for number, labels in enumerate(sets):
        (image, content), _ = tar_sample(f"{number}", picture(number), 0)
        entries += [(image, content), (f"{number}.json", json.dumps(labels).encode())]
    write_shard(tmp_path / "shards" / "a.tar", entries)
    crop = AugmentConfig(crop="rrc")  # keeps pictures at their own size, in tables
    for name, root in (("parquet", "rows"), ("image_list", "list.csv"), ("webdataset", "shards")):
        window = {"shuffle_window": 2} if name == "parquet" else {}
        for feed, augment in (("cached", None), ("cached", crop), ("streaming", None)):
            found = {**window, "feed": feed, "val_fraction": 0, "test_fraction": 0, "task": MULTI_LABEL}
            bundle = build_data(data_config(name, tmp_path / root, **found), augment)
            assert (bundle.info.class_names, bundle.info.task) == (["a", "b", "c"], MULTI_LABEL)
            cached = feed == "cached" and augment is None
            source = CachedRows(bundle.datasets["train"].iterator()) if cached else None
            labels = source.labels if source is not None else bundle.streams["train"].table.get()[1]
            assert unpacked(labels, 3).tolist() == expected, (name, feed)
            to_tensors = ToTensors(bundle.info, torch.device("cpu"), channels_last=False)
            taken = next(read(source or _streamed(bundle), [np.array([5, 1, 0])]))
            assert to_tensors.targets(taken.labels).tolist() == [expected[number] for number in (5, 1, 0)]


def _streamed(bundle):
    def refuse(bad):
        raise AssertionError(f"nothing is bad here: {bad}")

    return StreamedRows(bundle.streams["train"], bundle.info, 1, refuse, on_slow=lambda _: None)
