"""Samples drawn by class or repeatedly: exact shares in every epoch, dependent only on the position."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ftexp.config.schema import AugmentConfig, Config, DataConfig, TrainConfig
from ftexp.data.info import DataInfo
from ftexp.data.order import SampleOrder, derive_seed, permute_each
from ftexp.data.plan import even_part
from ftexp.data.sampling import (
    ClassOrder,
    ClassTable,
    Quotas,
    RepeatedOrder,
    epoch_in_words,
    identities,
    num_draws,
    run_order,
)

seeds = st.integers(0, 2**64 - 1)
counts_of_classes = st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(any).map(np.array)
samplings = st.sampled_from(["balanced", "sqrt"])


def table_of(counts):
    """Return a table of classes scattered over the sample numbers."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return ClassTable.of(np.random.default_rng(0).permutation(labels), len(counts))


def order_of(seed, counts, sampling, draws=None):
    table = table_of(counts)
    return table, ClassOrder(seed, table, Quotas.of(sampling, counts[counts > 0], draws or int(counts.sum())))


def classes_of(table, samples):
    labels = np.empty(len(table.members), np.int64)
    labels[table.members] = np.repeat(np.arange(len(table.counts)), table.counts)
    return labels[samples]


def config_of(sampling="shuffle", repeats=1, batch=8, seed=0, window=None):
    return Config(
        seed=seed,
        data=DataConfig(sampling=sampling, shuffle_window=window),
        augment=AugmentConfig(repeats=repeats),
        train=TrainConfig(epochs=3, global_batch_size=batch),
    )


# classes


@given(seed=seeds, counts=counts_of_classes, draws=st.integers(1, 200), epoch=st.integers(0, 2**30))
@settings(max_examples=30)
def test_balanced_draws_of_two_classes_differ_by_one_at_most_in_an_epoch_and_in_any_number_of_epochs(
    seed, counts, draws, epoch
):
    table, order = order_of(seed, counts, "balanced", draws)
    drawn = classes_of(table, order.samples(epoch * draws + np.arange(draws)))
    present = counts > 0
    found = np.bincount(drawn, minlength=len(counts))
    assert np.ptp(found[present]) <= 1
    assert not found[~present].any()
    before = Quotas.of("balanced", counts[present], draws).before(epoch)
    assert before.sum() == epoch * draws
    assert np.ptp(before) <= 1


@given(seed=seeds, counts=counts_of_classes, draws=st.integers(9, 400), epoch=st.integers(0, 2**30))
@settings(max_examples=30)
def test_sqrt_draws_are_proportional_to_the_root_of_a_classs_size_and_never_none(seed, counts, draws, epoch):
    table, order = order_of(seed, counts, "sqrt", draws)
    found = np.bincount(classes_of(table, order.samples(epoch * draws + np.arange(draws))), minlength=len(counts))
    present = counts > 0
    assert (found[present] >= 1).all()
    assert not found[~present].any()
    roots = np.sqrt(counts[present])
    own = draws * roots / roots.sum()
    if (own >= 1).all():
        assert (abs(found[present] - own) < 1).all()
    else:  # raising a class to one draw takes draws from the others
        assert (found[present] <= np.maximum(own, 1) + 1e-9 + (own >= 1)).all()
    assert (np.diff(found[present][np.argsort(counts[present], kind="stable")]) >= -1).all()


@given(seed=seeds, counts=counts_of_classes, sampling=samplings, draws=st.integers(9, 60), epochs=st.integers(1, 12))
@settings(max_examples=30)
def test_members_of_a_class_come_equally_often_after_any_number_of_epochs(seed, counts, sampling, draws, epochs):
    table, order = order_of(seed, counts, sampling, draws)
    times = np.bincount(order.samples(np.arange(epochs * draws)), minlength=len(table.members))
    for own in np.split(times[table.members], np.cumsum(counts)[:-1]):
        assert not len(own) or np.ptp(own) <= 1


@given(
    seed=seeds, counts=counts_of_classes, sampling=samplings, draws=st.integers(9, 60), position=st.integers(0, 10**15)
)
@settings(max_examples=30)
def test_a_draw_depends_on_its_position_alone_at_any_place_in_a_run(seed, counts, sampling, draws, position):
    _, order = order_of(seed, counts, sampling, draws)
    window = np.arange(position, position + 3)
    assert order.samples(window).tolist() == [int(order.samples(np.array(p))) for p in window]
    assert order.samples(window[::-1].reshape(1, 3)).tolist() == [order.samples(window)[::-1].tolist()]


def test_an_epoch_that_balances_equal_classes_is_each_sample_once():
    counts = np.full(7, 20)
    for sampling in ("balanced", "sqrt"):
        _, order = order_of(3, counts, sampling)
        for epoch in (0, 1, 999):
            assert sorted(order.samples(epoch * 140 + np.arange(140))) == list(range(140))


def test_classes_and_members_come_in_another_order_in_the_next_epoch_and_under_another_seed():
    counts = np.array([600, 200, 200])
    table, order = order_of(0, counts, "balanced", 600)
    first, second = order.samples(np.arange(1200)).reshape(2, 600)
    assert (first != second).mean() > 0.95
    for other in (second, order_of(1, counts, "balanced", 600)[1].samples(np.arange(600))):
        agree = (classes_of(table, first) == classes_of(table, other)).mean()
        assert abs(agree - 1 / 3) < 0.08
    rows = classes_of(table, first)
    assert abs(np.corrcoef(rows[:-1] == 0, rows[1:] == 0)[0, 1]) < 0.15  # neighbours are uncorrelated


def test_permutations_of_rows_are_permutations_and_uncorrelated():
    size, count = 97, 300
    seeds = np.repeat(np.arange(count, dtype=np.uint64), size)
    found = permute_each(np.tile(np.arange(size), count), np.full(size * count, size), seeds).reshape(count, size)
    assert (np.sort(found, axis=1) == np.arange(size)).all()
    correlations = [np.corrcoef(*pair)[0, 1] for pair in itertools.pairwise(found)]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(size * count)
    places = np.bincount(found[:, 0], minlength=size)
    assert (((places - count / size) ** 2) / (count / size)).sum() < size + 4 * np.sqrt(2 * size)


@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=5), seed=st.integers(0, 2**63))
def test_rows_of_several_sizes_are_permuted_side_by_side(sizes, seed):
    offsets = np.concatenate([np.arange(size) for size in sizes])
    rows = np.repeat(np.arange(len(sizes)), sizes)
    found = permute_each(offsets, np.array(sizes)[rows], np.uint64(seed) + rows.astype(np.uint64))
    for row, size in enumerate(sizes):
        assert sorted(found[rows == row]) == list(range(size))


# repeats

repeated = {"num_samples": st.integers(1, 60), "repeats": st.integers(1, 7), "batch": st.integers(1, 40)}


def repeated_order(num_samples, repeats, batch):
    return RepeatedOrder(SampleOrder(0, num_samples), num_samples, repeats, batch)


@given(**repeated, epoch=st.integers(0, 2**30))
def test_an_epoch_repeats_each_of_its_draws_and_the_last_as_often_as_is_left(num_samples, repeats, batch, epoch):
    order, draws = repeated_order(num_samples, repeats, batch), num_draws(num_samples, repeats)
    found = Counter(order.draws(epoch * num_samples + np.arange(num_samples)).tolist())
    last = num_samples - repeats * (draws - 1)
    assert [found[epoch * draws + number] for number in range(draws)] == [repeats] * (draws - 1) + [last]
    assert found.total() == num_samples


@given(**repeated, position=st.integers(0, 10**12))
@settings(max_examples=30)
def test_a_repeated_sample_depends_on_its_position_alone(num_samples, repeats, batch, position):
    order = repeated_order(num_samples, repeats, batch)
    window = np.arange(position, position + 4)
    assert order.samples(window).tolist() == [int(order.samples(np.array(p))) for p in window]
    assert (order.samples(window) == order.order.samples(order.draws(window))).all()


@given(repeats=st.integers(2, 5), each=st.integers(2, 9), batches=st.integers(1, 5))
def test_as_many_workers_as_repeats_have_a_copy_each_as_timm_deals_them(repeats, each, batches):
    batch = repeats * each
    order = repeated_order(batch * batches, repeats, batch)
    for start in range(0, batch * batches, batch):
        draws = order.draws(np.arange(start, start + batch))
        stream = np.arange(start, start + batch) // repeats
        for rank in range(repeats):
            low, high = even_part(0, batch, rank, repeats)
            assert draws[low:high].tolist() == stream[rank::repeats].tolist()  # timm's RepeatAugSampler for this rank


@given(repeats=st.integers(2, 5), factor=st.integers(3, 9), extra=st.integers(0, 4), batches=st.integers(1, 5))
def test_neighbours_that_are_mixed_are_never_copies_of_one_draw(repeats, factor, extra, batches):
    batch = repeats * factor + extra
    order = repeated_order(batch * batches, repeats, batch)
    draws = order.draws(np.arange(batch * batches)).reshape(batches, batch)
    assert (draws[:, : batch // 2 * 2 : 2] != draws[:, 1::2]).all()


@given(
    sampling=st.sampled_from(["shuffle", "balanced", "sqrt"]),
    counts=counts_of_classes,
    repeats=st.integers(1, 4),
    batch=st.integers(2, 30),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=30)
def test_a_run_draws_by_class_and_repeats_what_it_draws(sampling, counts, repeats, batch, seed):
    num_samples, draws = int(counts.sum()), num_draws(int(counts.sum()), repeats)
    assume(sampling != "sqrt" or draws >= np.count_nonzero(counts))
    table, config = table_of(counts), config_of(sampling, repeats, batch, seed)
    order = run_order(config, num_samples, None, table)
    once = run_order(config_of(sampling, 1, batch, seed), num_samples, None, table)
    positions = np.arange(3 * num_samples)
    samples = order.samples(positions)
    if repeats == 1:
        assert samples.tolist() == once.samples(positions).tolist()
    if sampling == "balanced":
        epoch = classes_of(table, samples[:num_samples])
        found = np.bincount(epoch, minlength=len(counts))[counts > 0]
        assert np.ptp(found) <= 2 * repeats - 1  # one draw more, and one that the epoch's end cuts off
    if sampling == "shuffle" and num_samples % repeats == 0:
        assert sorted(Counter(order.samples(np.arange(repeats * num_samples)).tolist()).items()) == [
            (sample, repeats) for sample in range(num_samples)
        ]
    checked = identities(config, num_samples, counts.tolist())
    if checked is None:
        assert (sampling, repeats) == ("shuffle", 1)
        return
    keys = list(zip(*(part.tolist() for part in checked(positions.tolist())), strict=True))
    held = {}
    for (turn, place), sample in zip(keys, samples.tolist(), strict=True):
        assert held.setdefault((turn, place), sample) == sample
        assert held.setdefault((turn, "sample", sample), place) == place


def test_what_an_epoch_draws_never_changes_between_versions():
    # a run that resumes under a newer ftexp must keep its order
    counts = np.array([2, 0, 5, 3])
    table = ClassTable.of(np.array([2, 0, 3, 2, 2, 0, 3, 2, 3, 2]), 4)
    assert (table.members.tolist(), table.counts.tolist()) == ([1, 5, 0, 3, 4, 7, 9, 2, 6, 8], counts.tolist())

    def drawn(*config):
        return run_order(config_of(*config), 10, None, table).samples(np.arange(20)).tolist()

    assert drawn("shuffle") == SampleOrder(derive_seed(0, 1), 10).samples(np.arange(20)).tolist()
    assert drawn("balanced") == [1, 2, 0, 6, 9, 3, 8, 5, 1, 6, 2, 3, 8, 1, 6, 7, 4, 4, 5, 5]
    assert drawn("sqrt") == [1, 8, 0, 2, 9, 3, 4, 5, 1, 6, 6, 9, 2, 1, 8, 4, 3, 7, 5, 5]
    assert drawn("shuffle", 3) == [1, 7, 3, 1, 7, 3, 1, 7, 3, 8, 5, 4, 5, 4, 5, 4, 6, 0, 6, 6]
    assert drawn("balanced", 2, 4) == [0, 2, 0, 2, 8, 3, 8, 3, 5, 5, 9, 9, 1, 6, 1, 6, 1, 6, 1, 6]


# the header


def words(counts, **config):
    info = DataInfo([f"c{n}" for n in range(len(counts))], 8, 1, [0.5], [0.25], {"train": sum(counts)})
    if config.get("sampling", "shuffle") != "shuffle":
        info = dataclasses.replace(info, class_counts=counts)
    return epoch_in_words(config_of(**config), info)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "1,000 samples, each once"),
        (
            {"repeats": 3},
            "334 of the 1,000 samples, each in 3 versions (augment.repeats=3); every sample in 3 epochs",
        ),
        (
            {"sampling": "balanced"},
            "1,000 draws, 333 or 334 of each of 3 classes (data.sampling=balanced): each of the 25 samples of 'c2' "
            "13.3 times, each of the 900 samples of 'c0' 0.37 times; 1 class has no training sample, so no draw",
        ),
        (
            {"sampling": "sqrt", "repeats": 2},
            "500 draws, each in 2 versions (augment.repeats=2), 57 to 344 of each of 3 classes (data.sampling=sqrt): "
            "each of the 25 samples of 'c2' 4.56 times, each of the 900 samples of 'c0' 0.764 times; 1 class has no "
            "training sample, so no draw",
        ),
    ],
)
def test_the_header_says_what_an_epoch_is(config, expected):
    assert words([900, 0, 25, 75], **config) == expected


def test_the_header_names_one_class_where_all_are_of_one_size():
    text = words([25, 25], sampling="balanced")
    assert text == "50 draws, 25 of each of 2 classes (data.sampling=balanced): each of the 25 samples of 'c0' 1 times"
