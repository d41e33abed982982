"""Order: a true permutation per epoch, available at any position, dependent only on the seed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.data.order import SampleOrder, WindowOrder, derive_seed, uniforms

seeds = st.integers(0, 2**64 - 1)


@given(seed=seeds, num_samples=st.integers(1, 3000), epoch=st.integers(0, 2**20))
def test_every_epoch_visits_every_sample_once(seed, num_samples, epoch):
    positions = epoch * num_samples + np.arange(num_samples)
    assert sorted(SampleOrder(seed, num_samples).samples(positions)) == list(range(num_samples))


@given(seed=seeds, num_samples=st.integers(1, 10**12), position=st.integers(0, 10**15))
def test_a_sample_depends_on_its_position_alone(seed, num_samples, position):
    order = SampleOrder(seed, num_samples)
    window = np.arange(position, position + 7)
    alone = [int(order.samples(np.array([p]))[0]) for p in window]
    assert order.samples(window).tolist() == alone
    assert all(0 <= sample < num_samples for sample in alone)


def test_epochs_and_seeds_differ():
    order = SampleOrder(0, 1000)
    first, second = order.samples(np.arange(1000)), order.samples(np.arange(1000, 2000))
    assert (first != second).mean() > 0.99
    assert (first != SampleOrder(1, 1000).samples(np.arange(1000))).mean() > 0.99


def test_the_order_of_a_seed_never_changes_between_versions():
    # a run that resumes under a newer ftexp must keep its order
    samples = SampleOrder(7, 10).samples(np.arange(20))
    assert samples.tolist() == [
        4,
        9,
        0,
        6,
        3,
        2,
        8,
        1,
        5,
        7,
        5,
        9,
        1,
        2,
        7,
        4,
        3,
        6,
        8,
        0,
    ]
    windows = WindowOrder(7, np.array([3, 0, 4, 3]), 2)
    assert windows.samples(np.arange(20)).tolist() == [4, 3, 6, 5, 1, 2, 7, 0, 8, 9, 3, 0, 2, 4, 6, 1, 5, 7, 9, 8]
    assert derive_seed(1, 2, 3) == 2869315087210772132


@pytest.fixture(scope="module", params=["all", "a window of all blocks"])
def places(request):
    """Place of each sample in each of 200 epochs, [epochs, samples]."""
    num_samples, num_epochs = 1257, 200
    order = SampleOrder(3, num_samples) if request.param == "all" else WindowOrder(3, np.full(419, 3), 419)
    return np.argsort(order.samples(np.arange(num_samples * num_epochs)).reshape(num_epochs, num_samples), axis=1)


def excess(counts, expected, freedom):
    """Return the chi-squared of counts, in standard deviations above its expectation for random counts."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_places_in_successive_epochs_are_uncorrelated(places):
    correlations = [np.corrcoef(*pair)[0, 1] for pair in itertools.pairwise(places)]
    # the mean of 199 correlations of independent permutations has a spread of 1/sqrt(1257 * 199) = 0.002
    assert abs(np.mean(correlations)) < 0.008


@pytest.mark.parametrize("apart", [1, 2, 7])
def test_where_a_sample_comes_in_one_epoch_says_nothing_about_a_later_one(places, apart):
    now, later = places[:-apart].ravel(), places[apart:].ravel()
    num_epochs, num_samples = places.shape
    parts = 16
    pairs = np.histogram2d(now, later, bins=parts, range=[[0, num_samples]] * 2)[0]
    ends = np.histogram(np.arange(num_samples), bins=parts, range=(0, num_samples))[0]
    expected = (num_epochs - apart) * np.outer(ends, ends) / num_samples
    assert abs(excess(pairs, expected, (parts - 1) ** 2)) < 4
    # all distances between the two places are equally frequent
    moves = np.bincount((later - now) % num_samples, minlength=num_samples)
    assert abs(excess(moves, num_epochs - apart, num_samples - 1)) < 4


def test_no_single_sample_comes_early_or_late_by_habit(places):
    num_samples = places.shape[1]
    centred = (places - (num_samples - 1) / 2) / np.sqrt((num_samples**2 - 1) / 12)
    for statistic in (centred[:-1] * centred[1:], centred):  # products with the next epoch, and values of all epochs
        # sums of independent values of spread 1, divided by the sums' spread; the sum of their squares is chi-squared
        scores = statistic.sum(axis=0) / np.sqrt(len(statistic))
        assert abs((scores**2).sum() - num_samples) < 4 * np.sqrt(2 * num_samples)


def test_neighbours_in_one_epoch_are_no_neighbours_in_the_next(places):
    num_epochs, num_samples = places.shape
    together = sum(
        np.count_nonzero(np.abs(np.diff(later[np.argsort(now)])) == 1) for now, later in itertools.pairwise(places)
    )
    expected = (num_epochs - 1) * (num_samples - 1) * 2 / num_samples  # independent permutations; Poisson
    assert abs(together - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize("draw", [0, 1])
def test_uniforms_are_uniform_and_of_their_position_alone(draw):
    values = uniforms(5, np.arange(50_000), draw)
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((counts - 2500) ** 2 / 2500).sum() < 45  # chi-squared with 19 degrees of freedom: above 45 once in 1,500
    assert uniforms(5, np.array([1234]), draw)[0] == values[1234]


def test_draws_of_one_position_are_independent():
    first, second = uniforms(5, np.arange(50_000), 0), uniforms(5, np.arange(50_000), 1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


# WindowOrder

sizes_of_blocks = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(np.array)
windows = st.integers(1, 14)


@given(seed=seeds, sizes=sizes_of_blocks, window=windows, epoch=st.integers(0, 2**20))
def test_every_epoch_of_windows_visits_every_sample_once(seed, sizes, window, epoch):
    order = WindowOrder(seed, sizes, window)
    positions = epoch * order.num_samples + np.arange(sizes.sum())
    assert sorted(order.samples(positions)) == list(range(sizes.sum()))


@given(
    seed=seeds, sizes=sizes_of_blocks, window=windows, positions=st.lists(st.integers(0, 2000), min_size=1, max_size=12)
)
def test_a_sample_depends_on_its_position_alone_whatever_it_is_asked_for_with(seed, sizes, window, positions):
    order = WindowOrder(seed, sizes, window)  # it holds two epochs at a time; requests come in any order
    alone = [int(WindowOrder(seed, sizes, window).samples(np.array([position]))[0]) for position in positions]
    assert order.samples(np.array(positions)).tolist() == alone
    assert [int(order.samples(np.array(position))) for position in positions] == alone


@given(seed=seeds, count=st.integers(1, 12), size=st.integers(1, 30), window=windows, epoch=st.integers(0, 100))
def test_a_window_gives_all_rows_of_its_blocks_and_of_no_others(seed, count, size, window, epoch):
    samples = WindowOrder(seed, np.full(count, size), window).samples(np.arange(count * size) + epoch * count * size)
    for start in range(0, count * size, window * size):
        inside = samples[start : start + window * size]
        assert np.unique(inside // size, return_counts=True)[1].tolist() == [size] * min(window, count - start // size)


@given(seed=seeds, sizes=sizes_of_blocks, window=windows)
def test_rows_of_a_block_lie_no_further_apart_than_a_window_is_long(seed, sizes, window):
    blocks = np.repeat(np.arange(len(sizes)), sizes)[WindowOrder(seed, sizes, window).samples(np.arange(sizes.sum()))]
    longest = np.sort(sizes)[-window:].sum()
    for block in np.unique(blocks):
        assert np.ptp(np.flatnonzero(blocks == block)) < longest


def test_blocks_come_in_another_order_in_the_next_epoch_and_under_another_seed():
    sizes = np.full(50, 4)

    def blocks(seed, epoch):
        found = WindowOrder(seed, sizes, 1).samples(epoch * 200 + np.arange(200)) // 4
        return found.reshape(50, 4)[:, 0]

    assert (blocks(0, 0) != blocks(0, 1)).mean() > 0.8
    assert (blocks(0, 0) != blocks(1, 0)).mean() > 0.8


def test_rows_of_a_block_come_in_another_order_in_the_next_epoch():
    order = WindowOrder(0, np.array([500]), 1)
    first, second = order.samples(np.arange(1000)).reshape(2, 500)
    assert (first != second).mean() > 0.98
    assert (first != np.arange(500)).mean() > 0.98


def test_another_thread_may_ask_for_other_epochs_meanwhile():
    order = WindowOrder(0, np.array([2, 1]), 1)
    expected = order.samples(np.arange(3)).tolist()

    class Interrupted(dict):
        def __contains__(self, number):
            found = super().__contains__(number)
            order._epochs = dict(self)
            for epoch in (5, 9):  # as another thread might, between the look-up and the use of an epoch
                WindowOrder.samples(order, np.arange(3) + 3 * epoch)
            return found

    order._epochs = Interrupted(order._epochs)
    assert order.samples(np.arange(3)).tolist() == expected
