"""Order: a true permutation per epoch, at any position, independent of everything but the seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.data.order import Order, derive_seed, uniforms

seeds = st.integers(0, 2**64 - 1)


@given(seed=seeds, num_samples=st.integers(1, 3000), epoch=st.integers(0, 2**20))
def test_every_epoch_visits_every_sample_once(seed, num_samples, epoch):
    positions = epoch * num_samples + np.arange(num_samples)
    assert sorted(Order(seed, num_samples).samples(positions)) == list(range(num_samples))


@given(seed=seeds, num_samples=st.integers(1, 10**12), position=st.integers(0, 10**15))
def test_a_sample_depends_on_its_position_alone(seed, num_samples, position):
    order = Order(seed, num_samples)
    window = np.arange(position, position + 7)
    alone = [int(order.samples(np.array([p]))[0]) for p in window]
    assert order.samples(window).tolist() == alone
    assert all(0 <= sample < num_samples for sample in alone)


def test_epochs_and_seeds_differ():
    order = Order(0, 1000)
    first, second = order.samples(np.arange(1000)), order.samples(np.arange(1000, 2000))
    assert (first != second).mean() > 0.99
    assert (first != Order(1, 1000).samples(np.arange(1000))).mean() > 0.99


def test_the_order_of_a_seed_never_changes_between_versions():
    # a run that resumes under a newer ftexp must go on in the order that it began in
    assert Order(7, 10).samples(np.arange(20)).tolist() == [4, 9, 0, 6, 3, 2, 8, 1, 5, 7, 5, 9, 1, 2, 7, 4, 3, 6, 8, 0]
    assert derive_seed(1, 2, 3) == 2869315087210772132


def test_places_in_successive_epochs_are_uncorrelated():
    num_samples, num_epochs = 1257, 200
    order = Order(3, num_samples)
    epochs = order.samples(np.arange(num_samples * num_epochs)).reshape(num_epochs, num_samples)
    places = np.argsort(epochs, axis=1)
    correlations = [np.corrcoef(places[e], places[e + 1])[0, 1] for e in range(num_epochs - 1)]
    # the mean of 199 correlations of independent permutations has a spread of 1/sqrt(1257 * 199) = 0.002
    assert abs(np.mean(correlations)) < 0.008


@pytest.mark.parametrize("draw", [0, 1])
def test_uniforms_are_uniform_and_of_their_position_alone(draw):
    values = uniforms(5, np.arange(50_000), draw)
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert ((counts - 2500) ** 2 / 2500).sum() < 45  # chi-squared of 19 degrees: above 45 once in 1,500
    assert uniforms(5, np.array([1234]), draw)[0] == values[1234]


def test_draws_of_one_position_are_independent():
    first, second = uniforms(5, np.arange(50_000), 0), uniforms(5, np.arange(50_000), 1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
