"""Labels as the sources read them."""

import pytest

from ftexp.data.build import build_data
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
        info = build_data(data_config(name, tmp_path / root, val_fraction=0, test_fraction=0)).info
        assert (info.class_names, info.integer_labels) == (["5", "7", "100001"], "values")
        info = build_data(data_config(name, tmp_path / root, num_classes=10)).info
        assert info.class_names == ["5", "7", "100001", *(f"class_{number}" for number in range(3, 10))]


def folder(root):
    found = (("train", "digit2", 0), ("train", "digit3", 1), ("val", "Digit2", 2), ("test", "digit3", 3))
    for split, label, number in found:
        put(root / split / label / f"{number}.png", encoded(picture(number)))


@pytest.mark.usefixtures("data_ray")
@pytest.mark.parametrize("feed", ["cached", "streaming"])
def test_either_feed_tells_of_classes_that_differ_between_splits(tmp_path, feed):
    folder(tmp_path)
    assert build_data(data_config("image_folder", tmp_path, feed=feed)).info.warnings == [
        "1 of the 1 samples of val have a class without a training sample, so each counts as wrong: 'Digit2' (1)",
        "classes whose names differ in case or Unicode form only: 'Digit2' and 'digit2'",
    ]
