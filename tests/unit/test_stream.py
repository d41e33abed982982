"""The streaming feed without Ray: samples keep their order through units, spans, pipelines and windows."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftexp.data.feeds import streamed as stream
from ftexp.data.feeds.feed import request
from ftexp.data.feeds.streamed import _Window, chained, slow_reason, spans, units
from ftexp.data.info import BadSample
from tests.support.processes import wait_until_none

requests_of_any_size = st.lists(st.integers(0, 300), max_size=20).map(
    lambda sizes: np.split(numbered(sum(sizes)), np.cumsum(sizes)[:-1], axis=1) if sizes else []
)


def numbered(count, first=0):
    """Return a request for samples 0, 3, 6, ... at positions 0, 1, 2, ..., from position `first`."""
    positions = np.arange(first, first + count)
    return request(3 * positions, positions)


@given(requests=requests_of_any_size, rows=st.integers(1, 256))
def test_units_hold_the_same_samples_in_the_same_order_whatever_the_pieces(requests, rows):
    asked = np.concatenate([numbered(0), *requests], axis=1)
    made = list(units(iter(requests), rows))
    assert np.array_equal(np.concatenate([numbered(0), *made], axis=1), asked)
    assert [unit.shape for unit in made] == [unit.shape for unit in units(iter([asked]), rows)]


@pytest.mark.parametrize(("rows", "sizes"), [(256, [32, 64, 128, 256, 256, 4]), (48, [32, 48, 48]), (5, [5, 5, 5, 1])])
def test_units_grow_from_small_ones_up_to_the_most_rows_and_leave_none_over(rows, sizes):
    assert [unit.shape[1] for unit in units((numbered(1) for _ in range(sum(sizes))), rows)] == sizes


def test_units_take_no_more_requests_than_they_need():
    requests = (numbered(10, first) for first in itertools.count(0, 10))
    made = units(requests, 256)
    assert np.array_equal(next(made), numbered(32))
    assert next(requests)[1, 0] == 40


def test_spans_are_equally_long_and_no_unit_is_lost():
    made = list(spans(iter([np.array([number]) for number in range(400)])))
    assert [len(span) for span in made] == [128, 128, 128, 16]
    assert np.concatenate([unit for span in made for unit in span]).tolist() == list(range(400))
    assert list(spans(iter([]))) == []


# chained


class Pipelines:
    """Replaces Ray Data: a span's blocks are its units. Logs the start and end of every pipeline."""

    def __init__(self, fail_at=None):
        self.log, self._fail_at = [], fail_at

    def __call__(self, span):
        number = sum(what == "began" for what, _ in self.log)
        self.log.append(("began", number))
        try:
            for unit in span:
                if unit == self._fail_at:
                    raise OSError(f"unit {unit} is broken")
                yield unit
        finally:
            self.log.append(("ended", number))


def never(seconds):
    raise AssertionError("nothing is slow here")


def cut(*sizes):
    numbers = itertools.count()
    return [list(itertools.islice(numbers, size)) for size in sizes]


@given(sizes=st.lists(st.integers(1, 30), max_size=6))
def test_blocks_of_all_spans_come_in_order_and_each_span_begins_once(sizes):
    start = Pipelines()
    assert list(chained(iter(cut(*sizes)), start, never)) == list(range(sum(sizes)))
    assert sorted(start.log) == sorted((what, n) for what in ("began", "ended") for n in range(len(sizes)))


def test_the_next_span_begins_while_some_of_the_one_before_is_left():
    begun = threading.Event()

    def start(span):
        if span[0]:
            begun.set()
        yield from span

    blocks = chained(iter(cut(20, 5)), start, never)
    assert [next(blocks) for _ in range(12)] == list(range(12))
    assert not begun.is_set()
    assert next(blocks) == 12  # the first of the last 8
    assert begun.wait(30)
    assert list(blocks) == list(range(13, 25))


@pytest.mark.parametrize("num_taken", [1, 14, 21])
def test_closing_ends_every_pipeline_that_began(num_taken):
    start = Pipelines()
    blocks = chained(iter(cut(20, 5, 30)), start, never)
    assert [next(blocks) for _ in range(num_taken)] == list(range(num_taken))
    blocks.close()

    def numbers(kind):
        return sorted(n for what, n in start.log if what == kind)

    wait_until_none(lambda: set(numbers("began")) - set(numbers("ended")))  # a thread may hold one for a moment
    began, ended = numbers("began"), numbers("ended")
    assert ended == began
    # the following pipeline may not have started yet
    assert len(began) in {1: [1], 14: [1, 2], 21: [2, 3]}[num_taken]


@pytest.mark.parametrize("broken", [0, 7, 20, 24])
def test_an_error_in_a_pipeline_surfaces_after_the_blocks_before_its_span(broken):
    blocks, got = chained(iter(cut(20, 5)), Pipelines(fail_at=broken), never), []
    with pytest.raises(OSError, match=f"unit {broken} is broken"):
        got.extend(iter(lambda: next(blocks), None))
    assert got == list(range(len(got)))
    assert len(got) == broken


def test_an_error_while_samples_are_chosen_surfaces():
    def failing():
        yield [0, 1]
        raise KeyError("no such epoch")

    with pytest.raises(KeyError, match="no such epoch"):
        list(chained(failing(), Pipelines(), never))


def test_whoever_waits_is_told_of_it_until_something_comes(monkeypatch):
    monkeypatch.setattr(stream, "_SLOW_S", 0.001)
    told, go_on = [], threading.Event()

    def start(span):
        assert go_on.wait(30)
        yield from span

    def on_slow(seconds):
        told.append(seconds)
        if len(told) == 3:
            go_on.set()

    assert list(chained(iter(cut(3)), start, on_slow)) == [0, 1, 2]
    assert len(told) >= 3
    waits = np.diff([0.0, *told[:3]])  # later reports belong to other waits
    assert all(wait >= 0.001 * 2**number for number, wait in enumerate(waits))  # at increasing intervals


def test_whoever_waits_for_a_block_of_a_pipeline_that_began_is_told_of_it(monkeypatch):
    monkeypatch.setattr(stream, "_SLOW_S", 0.001)
    told, is_late, go_on = [], threading.Event(), threading.Event()

    def start(span):
        for unit in span:
            if unit == 2:
                is_late.set()
                assert go_on.wait(30)
            yield unit

    def on_slow(seconds):
        if is_late.is_set():  # the start may be slow, too
            told.append(seconds)
        if len(told) == 3:
            go_on.set()

    assert list(chained(iter(cut(5)), start, on_slow)) == list(range(5))
    assert len(told) >= 3


def test_why_nothing_is_decoded_is_said_with_the_way_out():
    assert slow_reason(40.2, 3, 8).startswith("nothing decoded for 40 s: 3 of the cluster's 8 CPUs are free, so read")
    taken = slow_reason(20.1, 0, 8)
    assert taken.startswith("nothing decoded for 20 s: none of the cluster's 8 CPUs is free")
    assert "fewer workers, or scaling.resources_per_worker={CPU: 0.5}" in taken


@pytest.mark.parametrize(("size", "given"), [(5, 0), (5, 4), (20, 1), (20, 12), (20, 19)])
def test_a_pipeline_that_gives_fewer_blocks_than_it_was_asked_for_is_refused(size, given):
    def start(span):
        yield from span[:given]

    with pytest.raises(RuntimeError, match=f"the pipeline ended after {given} blocks of {size}"):
        list(chained(iter(cut(size, 3)), start, lambda _: None))


def test_closing_does_not_wait_for_a_pipeline_that_cannot_begin(monkeypatch):
    monkeypatch.setattr(stream, "_CLOSE_S", 0.001)
    beginning, go_on = threading.Event(), threading.Event()

    def start(span):
        if span[0]:
            beginning.set()
            assert go_on.wait(30)
        yield from span

    blocks = chained(iter(cut(9, 5)), start, never)
    assert [next(blocks), next(blocks)] == [0, 1]
    assert beginning.wait(30)
    blocks.close()
    go_on.set()


# the window


def decoded(samples, wrong=()):
    """Return a block like those of `Decode`; image and label identify the sample."""
    samples = np.asarray(samples)
    return {
        "image": np.broadcast_to(samples[:, None, None, None], (len(samples), 2, 2, 1)).astype(np.uint8),
        "label": samples * 10,
        "sample": samples,
        "error": np.array([f"{sample}.png\nValueError: torn" if sample in wrong else "" for sample in samples]),
    }


def window(*blocks):
    told = []
    return _Window(iter(blocks), told.append), told


def test_images_of_one_block_are_read_where_they_lie_and_by_plane_where_they_were_changed():
    block = decoded([3, 4, 5]) | {"image": np.arange(3 * 3 * 2 * 4, dtype=np.uint8).reshape(3, 3, 2, 4)}
    block["image"].flags.writeable = False  # as from Ray
    taken = _Window(iter([block]), pytest.fail, by_plane=True).take(np.array([3, 4]))
    assert np.shares_memory(taken.images, block["image"])
    assert taken.images.shape == (2, 2, 4, 3)
    assert taken.images[1, 0, 3, 2] == block["image"][1, 2, 0, 3]


@given(data=st.data(), num_rows=st.integers(1, 60))
def test_rows_are_handed_out_across_the_borders_of_blocks(data, num_rows):
    samples = np.random.default_rng(num_rows).integers(0, 20, num_rows)
    borders = data.draw(st.lists(st.integers(1, num_rows), unique=True).map(sorted))
    rows, told = window(*(decoded(part) for part in np.split(samples, borders) if len(part)))
    asked = data.draw(st.lists(st.integers(1, num_rows), unique=True).map(sorted))
    for part in np.split(samples, asked):
        if len(part):
            taken = rows.take(part)
            assert taken.images[:, 0, 0, 0].tolist() == part.tolist()
            assert taken.labels.tolist() == (10 * part).tolist()
            assert taken.readable is None
    assert told == []


@pytest.mark.parametrize("asked", [[0, 2], [1, 0], [1]], ids=str)
def test_other_samples_than_were_asked_for_are_refused(asked):
    rows, _ = window(decoded([0, 1, 2]))
    with pytest.raises(RuntimeError, match="other samples than requested"):
        rows.take(np.array(asked))


def test_a_pipeline_that_ends_early_is_refused():
    rows, _ = window(decoded([0, 1]))
    with pytest.raises(RuntimeError, match="ended before all requested samples"):
        rows.take(np.array([0, 1, 2]))


def test_rows_that_cannot_be_read_are_marked_and_told_of_once_a_block():
    rows, told = window(decoded([0, 1, 2, 3], wrong=[1, 3]), decoded([4, 5]), decoded([6, 7], wrong=[6]))
    assert rows.take(np.array([0])).readable is None
    assert rows.take(np.array([1, 2])).readable.tolist() == [False, True]
    assert rows.take(np.array([3, 4])).readable.tolist() == [False, True]
    assert told == [[BadSample("1.png", "ValueError: torn"), BadSample("3.png", "ValueError: torn")]]
    assert rows.take(np.array([5, 6, 7])).readable.tolist() == [True, False, True]
    assert told[1:] == [[BadSample("6.png", "ValueError: torn")]]


def test_whoever_is_told_of_bad_rows_may_end_the_pass():
    def refuse(bad):
        raise ValueError(bad[0].where)

    rows = _Window(iter([decoded([0]), decoded([1, 2], wrong=[2])]), refuse)
    assert rows.take(np.array([0])).labels.tolist() == [0]
    with pytest.raises(ValueError, match=r"2\.png"):
        rows.take(np.array([1]))
