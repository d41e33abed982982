"""Labels as they are written, the classes that they name, and what is told of those."""

import unicodedata

import numpy as np
import pytest

from ftexp.data.labels import class_numbers, class_warnings, from_text
from ftexp.driver.resume import labels_as_begun
from ftexp.errors import DataError
from tests.support.image_files import data_config


def numbered(*labels, **values):
    """Class names and numbers of labels written as text."""
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
