"""Meters: sums are independent of the order of addition, so that a resumed run reports the same numbers."""

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from ftexp.evaluation.meter import Meter, means
from ftexp.job.progress import Progress

CPU = torch.device("cpu")
floats = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30)


def add(meter, values):
    losses = torch.tensor(values, dtype=torch.float32)
    meter.add(losses, losses > 1, torch.ones(len(values), dtype=torch.bool))


@given(values=floats, cut=st.integers(0, 30))
def test_sums_are_the_same_to_the_bit_however_they_are_split(values, cut):
    whole, parts = Meter(CPU), Meter(CPU)
    add(whole, values)
    for part in (values[cut:], values[:cut]):
        if part:
            add(parts, part)
    assert whole.totals() == parts.totals()
    assert math.isclose(means(whole.totals())[0], sum(values) / len(values), abs_tol=1e-5)


def test_a_sum_of_any_losses_of_float32_is_exact_also_when_it_is_restored():
    values = [3e38, -3e38, 9e10, 1e20, -7e9, 0.25] * 200 + [2.0**-24, 3e38]
    meter = Meter(CPU)
    add(meter, values)
    expected = sum(Fraction(value) for value in torch.tensor(values).tolist()) * 2**24
    assert meter.totals()[0] == expected
    restored = Meter(CPU)
    restored.restore(meter.totals(), rank=0)
    assert restored.totals() == meter.totals()
    meter.add(-torch.tensor(values), torch.zeros(len(values), dtype=torch.bool), torch.ones(len(values)) > 0)
    assert meter.totals()[0] == 0
    restored.restore([-(3 * 2**40), 1, 2, 0], rank=0)  # the format of older checkpoints, which held one number
    assert restored.totals() == [-(3 * 2**40), 1, 2, 0]


def test_a_loss_beyond_float32_is_no_finite_one():
    meter = Meter(CPU)
    meter.add(torch.tensor([1e39], dtype=torch.float64), torch.tensor([False]), torch.tensor([True]))
    assert meter.totals() == [0, 0, 1, 1]


def test_rows_that_only_fill_up_are_not_counted():
    meter = Meter(CPU)
    meter.add(torch.tensor([1.0, 9.0]), torch.tensor([True, True]), torch.tensor([True, False]))
    assert means(meter.totals()) == (1.0, 1.0)


def test_a_non_finite_loss_shows_as_nan_and_nothing_counted_too():
    meter = Meter(CPU)
    assert all(math.isnan(value) for value in means(meter.totals()))
    meter.add(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]), torch.ones(2, dtype=torch.bool))
    loss, accuracy = means(meter.totals())
    assert math.isnan(loss)
    assert accuracy == 0.5


def test_restored_progress_goes_on_counting_on_rank_0_alone():
    progress = Progress(Meter(CPU), 960, step=3, position=96, epoch=1, metrics={"val_loss": 0.5})
    add(progress.train, [0.5, 2.0])
    state = progress.state_dict()
    ranks = [Progress(Meter(CPU), 960) for _ in range(2)]
    for rank, restored in enumerate(ranks):
        restored.load_state_dict(state, rank)
        assert (restored.step, restored.position, restored.epoch) == (3, 96, 1)
        assert restored.metrics == {"val_loss": 0.5}
    together = [sum(pair) for pair in zip(*(restored.train.totals() for restored in ranks), strict=True)]
    assert together == progress.train.totals()
