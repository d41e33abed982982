"""Both feeds give every position once, in the order, with the same bits, whatever the sizes.

Without Ray: cached rows are in blocks of any sizes; streamed ones are decoded here, by the stage that Ray Data runs.
"""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftexp.config.schema import AugmentConfig, Config, DataConfig, TrainConfig
from ftexp.data.augment.pixels import Augment
from ftexp.data.cropping import Fit
from ftexp.data.feeds import streamed as stream
from ftexp.data.feeds.decoding import Decode
from ftexp.data.feeds.feed import CachedRows, IndexedFeed, ToTensors, evaluation_batches
from ftexp.data.feeds.streamed import StreamedRows
from ftexp.data.info import DataInfo, IndexedSplit
from ftexp.data.plan import ShardPlan
from ftexp.data.sampling import ClassTable, run_order
from ftexp.job.build import _WhenAsked

SIZE = 4
INFO = DataInfo(["a", "b"], SIZE, 1, [0.0], [1.0], {})
TO_TENSORS = ToTensors(INFO, torch.device("cpu"), channels_last=False)
AUGMENT = AugmentConfig(pad_px=1, hflip=0.5, brightness=0.3)


@pytest.fixture(scope="module", autouse=True)
def small_tasks():
    """Reduce sizes: several units per pipeline and pipelines per pass, despite the few samples."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_FIRST_ROWS", 3), ("_UNIT_ROWS", 16), ("_OVERLAP_UNITS", 1), ("_SPAN_UNITS", 3)):
            patch.setattr(stream, name, value)
        yield


def image(sample):
    return np.random.default_rng(sample).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)


class DecodedHere(StreamedRows):
    """Streamed rows whose pipelines are loops in this process."""

    def _start(self, span):
        decode = Decode(self._split, Fit(SIZE, 1), self._augment)
        return (decode({"sample": samples, "position": positions}) for samples, positions in span)


def never(*_):
    raise AssertionError("nothing is bad or slow here")


def read(items):
    for item in items.tolist():
        yield f"item {item}", lambda item=item: image(item)


def streamed_rows(num_samples):
    samples = np.arange(num_samples)
    table = SimpleNamespace(get=lambda: (samples, samples % 2))
    return DecodedHere(IndexedSplit(num_samples, read, table, None), INFO, 1, never, never)


def cached_rows(block_sizes):
    parts = np.split(np.arange(block_sizes.sum()), np.cumsum(block_sizes)[:-1])
    blocks = [
        {"image": np.stack([image(sample) for sample in part]), "label": part % 2, "sample": part} for part in parts
    ]
    return CachedRows(SimpleNamespace(iter_batches=lambda **_: iter(blocks)))


sizes_of_blocks = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(
    blocks=sizes_of_blocks,
    batch=st.integers(1, 40),
    epochs=st.integers(1, 4),
    world=st.integers(1, 5),
    accumulate=st.integers(1, 2),
    window=st.sampled_from([None, 1, 2, "balanced"]),
    repeats=st.integers(1, 3),
    steps_done=st.integers(0, 6),
)
@example(
    blocks=[8, 8, 3], batch=4, epochs=2, world=2, accumulate=1, window=None, repeats=1, steps_done=0
)  # uneven last block
@example(blocks=[8, 8, 8], batch=8, epochs=2, world=1, accumulate=1, window=2, repeats=2, steps_done=1)  # one worker
@example(
    blocks=[9, 9], batch=6, epochs=2, world=5, accumulate=1, window=1, repeats=1, steps_done=2
)  # more workers than blocks
@example(
    blocks=[5, 4], batch=30, epochs=4, world=2, accumulate=2, window=None, repeats=2, steps_done=0
)  # a batch of 3.3 epochs
@example(
    blocks=[9, 8], batch=5, epochs=3, world=3, accumulate=1, window=2, repeats=3, steps_done=3
)  # 3.4 steps per epoch
@example(
    blocks=[3], batch=2, epochs=1, world=4, accumulate=1, window=None, repeats=1, steps_done=0
)  # more workers than samples
@settings(max_examples=50)
def test_every_position_comes_once_from_both_feeds_with_the_same_bits(
    blocks, batch, epochs, world, accumulate, window, repeats, steps_done
):
    sizes = np.array(blocks)
    num_samples, total = int(sizes.sum()), epochs * int(sizes.sum())
    sampled = {"sampling": "balanced"} if window == "balanced" else {"shuffle_window": window}
    config = Config(
        data=DataConfig(**sampled),
        augment=dataclasses.replace(AUGMENT, repeats=repeats),
        train=TrainConfig(global_batch_size=batch),
    )
    order = run_order(config, num_samples, sizes, ClassTable.of(np.arange(num_samples) % 2, 2))
    begin = min(steps_done * batch, total)
    counted, weight_of_step = {}, Counter()
    for rank in range(world):
        plan, augment = ShardPlan(batch, accumulate, total, rank, world), Augment(AUGMENT, seed=0)
        streamed, cached = (
            IndexedFeed(rows, order, plan, TO_TENSORS, augment).from_position(begin)
            for rows in (streamed_rows(num_samples), cached_rows(sizes))
        )
        for ours, theirs in zip(streamed, cached, strict=True):
            assert (ours.start, ours.end) == (theirs.start, theirs.end)
            assert ours.positions.tolist() == theirs.positions.tolist()
            assert ours.samples.tolist() == theirs.samples.tolist()
            for mine, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert torch.equal(mine.images, other.images)
                assert torch.equal(mine.labels, other.labels)
                assert torch.equal(mine.weights, other.weights)
                weight_of_step[ours.start] += float(mine.weights.sum())
            assert not counted.keys() & set(ours.positions.tolist())
            counted |= dict(zip(ours.positions.tolist(), ours.samples.tolist(), strict=True))
    assert counted == dict(zip(range(begin, total), order.samples(np.arange(begin, total)).tolist(), strict=True))
    assert sorted(weight_of_step) == list(range(begin, total, batch))
    assert list(weight_of_step.values()) == pytest.approx([world] * len(weight_of_step))  # DDP divides by `world`


@given(blocks=sizes_of_blocks, batch=st.integers(1, 40), world=st.integers(1, 5))
@example(blocks=[2, 1], batch=2, world=5)  # some ranks have no samples to evaluate
@settings(max_examples=25)
def test_evaluation_sees_each_sample_once_by_both_feeds(blocks, batch, world):
    sizes = np.array(blocks)
    for rows in (streamed_rows(int(sizes.sum())), cached_rows(sizes)):
        seen = []
        for rank in range(world):
            for images, labels in evaluation_batches(rows, TO_TENSORS, batch, rank, world):
                assert len(images) == len(labels) <= batch
                seen += [pixels.numpy().tobytes() for pixels in images]
        expected = [TO_TENSORS(image(sample)[None])[0].numpy().tobytes() for sample in range(int(sizes.sum()))]
        assert sorted(seen) == sorted(expected)


def test_what_tasks_took_for_a_sample_is_returned_once():
    rows = streamed_rows(9)
    assert len(list(evaluation_batches(rows, TO_TENSORS, 4, 0, 1))) == 3
    costs = rows.costs_ms()
    assert list(costs) == ["read_ms", "decode_ms", "crop_ms", "augment_ms"]
    assert costs["decode_ms"] > costs["augment_ms"] == 0
    assert rows.costs_ms() == cached_rows(np.array([9])).costs_ms() == {}


def test_a_split_is_read_when_it_is_asked_for_and_once():
    read = []
    rows = _WhenAsked(lambda split: read.append(split) or cached_rows(np.array([3])))
    assert len(rows["train"]) == len(rows["train"]) == 3
    assert read == ["train"]
    assert rows["val"] is rows["val"]
    assert read == ["train", "val"]
