"""Feeds: every position in one share of one batch, gradients that are the global mean, rows in order."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftexp.data.feeds.feed import CachedRows, ToTensors, evaluation_batches, prefetched
from ftexp.data.info import DataInfo
from ftexp.data.order import SampleOrder
from ftexp.data.plan import ShardPlan, even_part
from tests.support.feeds import CPU, Blocks, Unreadable, block, make_feed


@given(
    batch=st.integers(1, 50),
    accumulate=st.integers(1, 4),
    total=st.integers(1, 300),
    world=st.integers(1, 7),
    data=st.data(),
)
def test_every_position_counts_in_exactly_one_micro_batch(batch, accumulate, total, world, data):
    start_at = data.draw(st.integers(0, total))
    counted = []
    for rank in range(world):
        plan = ShardPlan(batch, accumulate, total, rank, world)
        for start, end in plan.batch_ends(start_at):
            for share in plan.micro_shares(start, end):
                assert len(share.positions) >= 2, "batch norm can't train on one row"
                assert ((share.positions >= start) & (share.positions < end)).all()
                counted += share.positions[: share.num_counted].tolist()
    assert sorted(counted) == list(range(start_at, total))


@given(start=st.integers(0, 1000), size=st.integers(0, 1000), parts=st.integers(1, 20))
def test_even_parts_tile_the_range_and_differ_by_one_at_most(start, size, parts):
    cut = [even_part(start, start + size, part, parts) for part in range(parts)]
    assert [edge for pair in cut for edge in pair][1:-1:2] == [low for low, _ in cut][1:]
    assert (cut[0][0], cut[-1][1]) == (start, start + size)
    sizes = [high - low for low, high in cut]
    assert max(sizes) - min(sizes) <= 1


@given(batch=st.integers(1, 40), resume_after=st.integers(0, 10))
def test_resuming_at_a_position_gives_the_batches_that_would_have_come(batch, resume_after):
    plan = ShardPlan(batch, 1, 120, rank=1, world_size=2)
    whole = list(make_feed(50, plan).from_position(0))
    position = min(resume_after * batch, 120)
    resumed = list(make_feed(50, plan).from_position(position))
    expected = [b for b in whole if b.start >= position]
    assert [(b.start, b.end) for b in resumed] == [(b.start, b.end) for b in expected]
    for ours, theirs in zip(resumed, expected, strict=True):
        for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            assert torch.equal(mine.images, other.images)
            assert torch.equal(mine.labels, other.labels)


@pytest.mark.parametrize(("batch", "world", "accumulate"), [(12, 1, 1), (12, 5, 1), (7, 3, 2), (2, 4, 1), (1, 2, 3)])
def test_weighted_gradients_averaged_over_ranks_are_the_global_mean(batch, world, accumulate):
    """Compare DDP's gradient from the shares with that of one process with the whole batch, in float64."""
    total = 2 * batch
    torch.manual_seed(0)
    weight = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)

    def gradient(images, labels, weights):
        losses = torch.nn.functional.cross_entropy(images.double().flatten(1) @ weight, labels % 3, reduction="none")
        (grad,) = torch.autograd.grad((losses * weights).sum(), weight)
        return grad

    whole = next(make_feed(10, ShardPlan(batch, 1, total, 0, 1)).from_position(batch))
    rows = whole.micro_batches[0]
    kept = rows.weights > 0
    expected = gradient(rows.images[kept], rows.labels[kept], torch.full((int(kept.sum()),), 1 / batch).double())
    parts = []
    for rank in range(world):
        feed = make_feed(10, ShardPlan(batch, accumulate, total, rank, world))
        share = next(feed.from_position(batch))
        parts.append(sum(gradient(m.images, m.labels, m.weights.double()) for m in share.micro_batches))
    torch.testing.assert_close(sum(parts) / world, expected, rtol=1e-6, atol=1e-9)


def test_rows_are_in_sample_order_however_blocks_arrive():
    rows = CachedRows(Blocks(block([5, 4]), block([0, 3, 1]), block([2])))
    taken = rows.take(np.array([5, 0, 2, 2]))
    assert taken.labels.tolist() == [50, 0, 20, 20]
    assert taken.images[:, 0, 0, 0].tolist() == [5, 0, 2, 2]
    assert rows.take(np.arange(6)).labels.tolist() == [0, 10, 20, 30, 40, 50]


def test_a_single_block_is_read_in_place():
    blocks = block(np.arange(6))
    rows = CachedRows(Blocks(blocks))
    assert np.shares_memory(rows._images[0], blocks["image"])


def test_an_empty_split_has_no_rows():
    assert len(CachedRows(Blocks())) == 0


@given(num_samples=st.integers(0, 60), world=st.integers(1, 5), batch=st.integers(1, 20))
def test_evaluation_sees_each_sample_exactly_once(num_samples, world, batch):
    info = DataInfo(["a", "b"], 4, 1, [0.0], [1.0], {})
    rows = CachedRows(Blocks(block(np.arange(num_samples)))) if num_samples else CachedRows(Blocks())
    seen = []
    for rank in range(world):
        for images, labels in evaluation_batches(rows, ToTensors(info, CPU, False), batch, rank, world):
            assert len(images) == len(labels) <= batch
            seen += labels.tolist()
    assert sorted(seen) == [10 * number for number in range(num_samples)]


@given(unreadable=st.sets(st.integers(0, 29)), accumulate=st.integers(1, 3))
def test_rows_that_cannot_be_read_weigh_nothing_and_the_others_what_they_did(unreadable, accumulate):
    plan = ShardPlan(8, accumulate, 90, rank=1, world_size=2)
    whole = make_feed(30, plan).from_position(0)
    holey = make_feed(30, plan, rows=Unreadable(30, unreadable)).from_position(0)
    for ours, theirs in zip(holey, whole, strict=True):
        assert ours.samples.tolist() == theirs.samples.tolist()
        for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            read = ~torch.isin(mine.labels, torch.tensor([10 * sample for sample in unreadable], dtype=torch.int64))
            assert torch.equal(mine.labels, other.labels)
            assert torch.equal(mine.weights, other.weights * read)
            assert torch.equal(mine.images[read], other.images[read])


def test_a_feed_opens_its_rows_with_all_that_it_will_take_in_that_order():
    class Recorded(Unreadable):
        def open(self, requests):
            self.asked, self.taken = np.concatenate(list(requests), axis=1), []
            return contextlib.nullcontext(self.take)

        def take(self, samples):
            self.taken.append(samples)
            return super().take(samples)

    rows = Recorded(3000, [])
    feed = make_feed(3000, ShardPlan(7, 2, 6001, rank=1, world_size=3), rows=rows)  # more than one plan covers
    assert sum(1 for _ in feed.from_position(14)) == len(range(14, 6001, 7))
    samples, positions = rows.asked
    assert samples.tolist() == np.concatenate(rows.taken).tolist()
    assert samples.tolist() == SampleOrder(0, 3000).samples(positions).tolist()


@given(unreadable=st.sets(st.integers(0, 29)), world=st.integers(1, 3), batch=st.integers(1, 12))
def test_evaluation_leaves_out_what_cannot_be_read(unreadable, world, batch):
    info = DataInfo(["a", "b"], 4, 1, [0.0], [1.0], {})
    rows, seen = Unreadable(30, unreadable), []
    for rank in range(world):
        for images, labels in evaluation_batches(rows, ToTensors(info, CPU, False), batch, rank, world):
            torch.testing.assert_close(images[:, 0, 0, 0] * 255, labels / 10)
            seen += labels.tolist()
    assert sorted(seen) == [10 * number for number in range(30) if number not in unreadable]


def test_pixels_are_scaled_and_normalised_per_channel():
    info = DataInfo(["a", "b"], 2, 2, [0.5, 0.25], [0.5, 0.125], {})
    rows = np.zeros((1, 2, 2, 2), np.uint8)
    rows[..., 0], rows[..., 1] = 255, 51
    images = ToTensors(info, CPU, channels_last=False)(rows)
    assert images.shape == (1, 2, 2, 2)
    torch.testing.assert_close(images[0, 0], torch.full((2, 2), 1.0))
    torch.testing.assert_close(images[0, 1], torch.full((2, 2), (0.2 - 0.25) / 0.125))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["by row", "by plane", "read-only"])
def test_every_value_of_a_pixel_is_normalised_to_the_bits_of_the_plain_formula(channels, layout):
    mean, std = [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]
    info = DataInfo(["a", "b"], 16, channels, mean, std, {})
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(256, dtype=np.uint8), (5 * channels, 1)), axis=1)
    rows = rows.reshape(5, channels, 16, 16).transpose(0, 2, 3, 1)
    if layout != "by plane":
        rows = np.ascontiguousarray(rows)
    rows.flags.writeable = layout != "read-only"
    middle, spread = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    expected = (torch.tensor(rows).permute(0, 3, 1, 2).float() / 255 - middle) / spread
    for channels_last in (False, True):
        assert torch.equal(ToTensors(info, torch.device("cpu"), channels_last)(rows), expected)


def test_memory_of_a_batch_is_used_again_once_nothing_refers_to_it_and_not_before():
    info = DataInfo(["a", "b"], 4, 3, [0.5] * 3, [0.5] * 3, {})
    to_tensors = ToTensors(info, torch.device("cpu"), channels_last=False)
    batches = [np.full((2, 4, 4, 3), value, np.uint8) for value in (0, 51, 102, 153)]
    first = to_tensors(batches[0])
    view, place = first[1:, 2], first.data_ptr()
    del first
    second = to_tensors(batches[1])
    assert second.data_ptr() != place
    assert (view == -1).all()
    del view
    third = to_tensors(batches[2])
    assert third.data_ptr() == place
    assert to_tensors(batches[3][:1]).shape == (1, 3, 4, 4)
    assert torch.equal(second, torch.full_like(second, 0.2).sub(0.5).div(0.5))


def test_channels_last_changes_the_layout_and_no_value():
    info = DataInfo(["a", "b"], 4, 3, [0.5] * 3, [0.5] * 3, {})
    rows = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    plain, last = (ToTensors(info, CPU, channels_last)(rows) for channels_last in (False, True))
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_keeps_order_and_passes_errors_on(depth):
    def items():
        yield from range(1, 6)
        raise KeyError("broken sample")

    made = prefetched(items(), depth)
    assert [next(made) for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(KeyError, match="broken sample"):
        next(made)
    assert list(prefetched(iter([1, 2]), depth)) == [1, 2]
