"""Splits: disjoint, complete, stratified, and determined by the seed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ftexp.data.info import DataInfo
from ftexp.data.stratify import stratified_split

label_lists = st.lists(st.integers(0, 4), max_size=120).map(lambda values: np.array(values, np.int64))
fraction_pairs = st.tuples(st.floats(0, 0.5), st.floats(0, 0.45))


@given(labels=label_lists, fractions=fraction_pairs, seed=st.integers(0, 2**32))
def test_every_sample_is_in_exactly_one_part_and_parts_are_sorted(labels, fractions, seed):
    parts = stratified_split(labels, fractions, seed)

    assert len(parts) == 3
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert all(part.dtype == np.int64 for part in parts)


@given(labels=label_lists, fractions=fraction_pairs, seed=st.integers(0, 2**32))
def test_each_class_is_within_one_sample_of_its_share(labels, fractions, seed):
    parts = stratified_split(labels, fractions, seed)

    for label in np.unique(labels):
        size = int(np.sum(labels == label))
        if (1 - sum(fractions)) * size >= 1:  # below that, the promise of the next test has priority
            for part, fraction in zip(parts, (1 - sum(fractions), *fractions), strict=True):
                assert abs(np.sum(labels[part] == label) - fraction * size) <= 1 + 1e-9


@given(labels=label_lists, fractions=fraction_pairs, seed=st.integers(0, 2**32))
def test_no_class_loses_its_last_sample_to_another_part(labels, fractions, seed):
    rest, *_ = stratified_split(labels, fractions, seed)

    assert set(labels[rest]) == set(labels)


def test_parts_are_as_large_as_the_fractions_say_in_their_order():
    labels = np.repeat([0, 1], 50)

    rest, val, test = stratified_split(labels, (0.1, 0.3), 0)

    assert [len(rest), len(val), len(test)] == [60, 10, 30]
    assert [np.sum(labels[part] == 0) for part in (rest, val, test)] == [30, 5, 15]


def test_same_seed_gives_the_same_split_and_another_seed_another():
    labels = np.arange(60) % 3
    first, again, other = (stratified_split(labels, (0.2, 0.2), seed) for seed in (1, 1, 2))

    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    for part, changed in zip(first, other, strict=True):
        assert part.tolist() != changed.tolist()
        assert len(part) == len(changed)


def test_members_of_a_part_are_drawn_from_the_whole_class_not_from_its_start():
    _, test = stratified_split(np.zeros(1000, np.int64), (0.2,), 0)

    quarters = np.histogram(test, bins=[0, 250, 500, 750, 1000])[0]
    assert quarters.sum() == 200
    assert quarters.min() >= 25  # 50 expected in each


def test_without_fractions_all_samples_stay_together():
    (rest,) = stratified_split(np.array([3, 1, 3]), (), 0)

    assert rest.tolist() == [0, 1, 2]


def test_number_of_classes_is_that_of_the_class_names():
    assert DataInfo(["a", "b", "spare"], 4, 1, [0.5], [0.5], {}).num_classes == 3
