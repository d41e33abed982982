"""Labels in files, the classes that they name, and messages about these."""

import unicodedata

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem

from ftexp.data.labels import class_numbers, class_warnings, from_text
from ftexp.data.sources import arrays
from ftexp.data.sources.webdataset import scan_shard
from ftexp.data.targets import is_packed, joined_label
from ftexp.driver.resume import labels_as_begun
from ftexp.errors import DataError
from tests.support.image_files import data_config, write_shard


def numbered(*labels, **values):
    """Return class names and class numbers of labels written as text."""
    config = data_config("image_list", "unused", **values)
    found = from_text({"train": list(labels)}, config)
    names, numbers = class_numbers(found, config, "it", lambda split, item: f"{split} {item}")
    return names, numbers["train"].tolist()


def test_whole_numbers_are_classes_by_their_values_in_their_order():
    assert numbered("100004", "9", "100001", "9") == (["9", "100001", "100004"], [2, 0, 1, 0])
    assert numbered("1", "2", "3", "4") == (["1", "2", "3", "4"], [0, 1, 2, 3])


@pytest.mark.parametrize("other", ["007", "07", "-1", "1.0", "cat", "٣", "1_0", " 7"])
def test_one_label_that_is_no_number_as_those_are_printed_makes_all_text(other):
    assert numbered("7", "10", other)[0] == sorted(["7", "10", other])


def test_num_classes_makes_whole_numbers_the_classes_numbers_where_all_are_below_it():
    assert numbered("1", "4", num_classes=6) == (["0", "1", "2", "3", "4"], [1, 4])  # make_info adds class_5
    assert numbered("1", "4", num_classes=4) == (["1", "4"], [0, 1])


def test_a_run_that_began_before_there_was_a_choice_keeps_its_classes():
    begun = labels_as_begun(data_config("image_list", "unused"), {"class_names": ["0", "1"]})
    assert begun.integer_labels == "indices"
    assert numbered("3", "007", integer_labels=begun.integer_labels) == ([str(n) for n in range(8)], [3, 7])
    config = data_config("image_list", "unused", integer_labels="indices")
    assert labels_as_begun(config, {"integer_labels": "values"}).integer_labels == "values"
    assert labels_as_begun(config, {}) == config


def test_a_label_that_is_none_is_named_with_its_place():
    config = data_config("parquet", "unused")
    with pytest.raises(DataError, match=r"^it holds 2\.5 at val 1, and 2 more like it: labels are all text"):
        class_numbers(
            {"train": [1, 2, 3], "val": [0, 2.5, None, "a"]}, config, "it", lambda split, item: f"{split} {item}"
        )


def test_classes_that_train_lacks_are_told_with_counts():
    labels = {"train": np.array([0, 0, 2]), "val": np.array([0, 1, 1, 3]), "test": np.array([2])}
    assert class_warnings(["a", "b", "c", "d"], labels) == [
        "3 of the 4 samples of val have a class without a training sample, so each counts as wrong: 'b' (2), 'd' (1)"
    ]


def test_names_that_differ_in_case_or_unicode_form_only_are_told():
    composed, decomposed = (unicodedata.normalize(form, "bär") for form in ("NFC", "NFD"))
    labels = {"train": np.arange(5)}
    assert class_warnings([decomposed, composed, "Digit2", "digit2", "other"], labels) == [
        "classes whose names differ in case or Unicode form only: 'ba\\u0308r' and 'b\\xe4r'; 'Digit2' and 'digit2'"
    ]


def test_classes_of_any_whole_numbers_are_stored_as_int64_and_fractions_are_refused():
    images, config = np.zeros((6, 8, 8, 3), np.uint8), data_config("mine", None, image_size=8)
    numbers = np.array([0, 1, 2] * 2)
    assert arrays._as_stored(config, numbers) is numbers
    for dtype in (np.uint8, np.int32, np.int64):
        stored = arrays._as_stored(config, numbers.astype(dtype))
        assert (stored.dtype, stored.tolist(), is_packed(stored)) == (np.int64, numbers.tolist(), False)
        arrays._require_sound(config, images, numbers.astype(dtype), 3)
    with pytest.raises(DataError, match=r"^data\.name=mine has labels of type float32: give numbers of classes"):
        arrays._require_sound(config, images, numbers.astype(np.float32), 3)


def test_numbers_are_written_as_exactly_as_they_are_stored():
    values = np.array([16777217.5, 0.1234567891, 0.1, 3], np.float32)
    assert np.float32(joined_label(values, [], " ").split()).tolist() == values.tolist()
    assert joined_label(values[2:], [], " ") == "0.1 3"


def test_a_list_of_labels_is_one_and_a_cls_beside_it_wins(tmp_path):
    jsons = {"a": '["x", "y"]', "b": '{"label": 3}', "c": "no json", "d": "2.5", "e": '{"width": 3}', "f": "true"}
    entries = [(f"{name}.png", b"image") for name in jsons] + [
        (f"{name}.json", text.encode()) for name, text in jsons.items()
    ]
    path = write_shard(tmp_path / "a.tar", [*entries, ("e.cls", b"z")])
    found, account = scan_shard(LocalFileSystem(), str(path), endings=("cls", "json"))
    assert {entry.name: entry.label for entry in found} == {"a": '["x", "y"]', "d": "2.5", "e": "z"}
    reason = "its .json holds neither a list nor a number"
    assert [(bad.where.split()[-1], bad.reason) for bad in account.bad] == [(name, reason) for name in "bcf"]
    assert [(rule.reason, rule.count) for rule in account.excluded] == [
        (".json next to a .cls, which takes precedence", 1)
    ]
