"""Rows that are decoded while the run trains, by one Ray Data pipeline per rank.

A rank's pipeline decodes the samples that this rank will request, in that order, on CPUs of any node. Data are not
distributed over ranks, so they can't reach the wrong rank or arrive in another order. A pipeline can start at any
position at the same cost. A rank that returns to an earlier position starts a new pipeline in the same process.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from ftexp.data.augment.picture import PictureAugment
from ftexp.data.feeds.decoding import PARTS, Decode, bad_sample, decoding
from ftexp.data.feeds.feed import COSTS, CachedRows, Request, Rows, Take, Taken
from ftexp.data.info import BadSample, DataBundle, DataInfo, IndexedSplit
from ftexp.data.order import Int64s
from ftexp.data.targets import Labels

_UNIT_ROWS, _UNIT_BYTES = 256, 32 * 2**20  # maximum of what one task decodes; small tasks have too much overhead
_FIRST_ROWS = 32  # rows of the first unit, so that the first batch is ready soon; doubled for each further unit
_SPAN_UNITS = 128  # units of one Ray Dataset. Ray plans a whole Dataset in advance; a run would have millions of units
_OVERLAP_UNITS = 8  # remaining units of a span when the next span starts

_ROW_EXTRA_BYTES = 88  # sample number, error, traits and cost
_SLOW_S = 20.0
_CLOSE_S = 5.0

T = TypeVar("T")
Block = dict[str, Any]  # columns of ftexp.data.feeds.decoding.Decode


class StreamedRows:
    """A split's rows, decoded while they are used. Every pass over them has its own pipeline."""

    def __init__(
        self,
        split: IndexedSplit,
        info: DataInfo,
        num_tasks: int,
        on_bad: Callable[[list[BadSample]], None],
        on_slow: Callable[[float], None],
        augment: PictureAugment | None = None,
        on_block: Callable[[Block], None] = lambda _: None,
    ) -> None:
        """Set up; decoding starts with `open`.

        num_tasks: number of concurrent tasks that decode and apply `augment`, on one CPU each.
        on_bad: called with samples that can't be read; may raise, which ends the pass.
        on_slow: called with the seconds in which nothing was decoded, at doubling intervals.
        on_block: called with each block that is read.
        """
        self._split, self._info, self._num_tasks = split, info, num_tasks
        self._on_bad, self._on_slow = on_bad, on_slow
        self._augment, self._on_block = augment, on_block
        self._spent_ms, self._num_made = np.zeros(len(PARTS)), 0  # since `costs_ms` was called
        label_bytes = split.table.get()[1][:1].nbytes
        self._row_bytes = info.image_size**2 * info.channels + label_bytes + _ROW_EXTRA_BYTES

    def __len__(self) -> int:
        return self._split.num_samples

    @property
    def labels(self) -> Labels:
        """The label of each sample."""
        return self._split.table.get()[1]

    @contextmanager
    def open(self, requests: Iterator[Request]) -> Iterator[Take]:
        """Start the pipeline; it stops when the context exits."""
        rows = max(16, min(_UNIT_ROWS, _UNIT_BYTES // self._row_bytes))
        blocks = chained(spans(units(requests, rows)), self._start, self._on_slow)
        try:
            yield _Window(blocks, self._on_bad, self._read, by_plane=self._augment is not None).take
        finally:
            blocks.close()

    def _read(self, block: Block) -> None:
        self._spent_ms, self._num_made = self._spent_ms + block["cost"].sum(0), self._num_made + len(block["cost"])
        self._on_block(block)

    def costs_ms(self) -> dict[str, float]:
        """Return the mean time of each part of making a sample, over the samples read since the last call.

        It is spent in tasks on other CPUs; training waits only if the tasks are too slow.
        """
        spent_ms, num_made = self._spent_ms, self._num_made
        self._spent_ms, self._num_made = np.zeros(len(PARTS)), 0  # may lose a block that is read at the same time
        return dict(zip(COSTS, (spent_ms / num_made).round(3).tolist(), strict=True)) if num_made else {}

    def _start(self, span: list[Request]) -> Iterator[Block]:
        num_tasks = self._num_tasks + 1  # one task waits, so that no CPU is idle
        columns = [{"sample": samples, "position": positions} for samples, positions in span]
        dataset = decoding(
            self._split, self._info, columns, num_tasks, functools.partial(Decode, augment=self._augment)
        )
        context = dataset.context
        options = context.execution_options
        options.preserve_order = True
        unit_bytes = max(unit.shape[1] for unit in span) * self._row_bytes
        # units in progress, as many waiting ones, and those being read
        store = (2 * num_tasks + 2) * unit_bytes
        options.resource_limits = options.resource_limits.copy(cpu=num_tasks, object_store_memory=store)
        context.enable_progress_bars = False
        return iter(dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))


def bundle_rows(
    bundle: DataBundle,
    split: str,
    num_tasks: int,
    on_bad: Callable[[list[BadSample]], None],
    on_block: Callable[[Block], None] = lambda _: None,
) -> Rows:
    """Return a split's rows for use outside of a run, by the bundle's feed; callbacks as in `StreamedRows`."""
    if not bundle.streamed:
        return CachedRows(bundle.datasets[split].iterator())
    return StreamedRows(bundle.indexed[split], bundle.info, num_tasks, on_bad, lambda _: None, on_block=on_block)


def units(requests: Iterator[Request], rows: int) -> Iterator[Request]:
    """Yield the same samples in the same order, in units that grow to `rows`."""
    size, waiting, num_waiting = min(_FIRST_ROWS, rows), [np.empty((2, 0), np.int64)], 0
    for request in requests:
        waiting.append(request)
        num_waiting += request.shape[1]
        while num_waiting >= size:
            joined = np.concatenate(waiting, axis=1)
            yield joined[:, :size]
            waiting, num_waiting = [joined[:, size:]], num_waiting - size
            size = min(2 * size, rows)
    if num_waiting:
        yield np.concatenate(waiting, axis=1)


def spans(pieces: Iterator[Request]) -> Iterator[list[Request]]:
    """Return an iterator of lists of units, one list per Ray Dataset.

    The first list is long too: a new pipeline decodes one unit at a time until Ray knows the size of a block.
    """
    return iter(lambda: list(itertools.islice(pieces, _SPAN_UNITS)), [])


def chained(
    spans: Iterator[list[Request]],
    start: Callable[[list[Request]], Iterator[Block]],
    on_slow: Callable[[float], None],
) -> Generator[Block]:
    """Yield the blocks of all spans in order; a span starts decoding before the previous one ends."""

    def begin() -> tuple[int, Iterator[Block]] | None:
        span = next(spans, None)
        if span is None:
            return None
        blocks = start(span)
        first = list(itertools.islice(blocks, 1))  # makes Ray Data start
        return len(span), itertools.chain(first, blocks)

    pool = ThreadPoolExecutor(2, thread_name_prefix="stream")  # one starts a span while the other waits for a block
    coming: Future[tuple[int, Iterator[Block]] | None] = pool.submit(begin)
    try:
        while (begun := _awaited(coming, on_slow)) is not None:
            (num_units, blocks), given = begun, 0
            while (block := _awaited(pool.submit(next, blocks, None), on_slow)) is not None:
                given += 1
                if given == max(1, num_units - _OVERLAP_UNITS + 1):
                    coming = pool.submit(begin)
                yield block
            if given < num_units:
                raise RuntimeError(f"the pipeline ended after {given} blocks of {num_units}")
    finally:
        # a started span stops when nothing refers to it; a span that can't start for lack of a CPU isn't waited for
        pool.shutdown(wait=False)
        if not coming.cancel():
            wait([coming], _CLOSE_S)


def _awaited(future: Future[T], on_slow: Callable[[float], None]) -> T:
    started, patience_s = time.monotonic(), _SLOW_S
    while not wait([future], patience_s).done:
        on_slow(time.monotonic() - started)
        patience_s *= 2
    return future.result()


def slow_reason(seconds: float, free_cpus: float, num_cpus: float) -> str:
    """Return the message for `seconds` in which nothing was decoded. num_cpus: CPUs of the cluster."""
    if free_cpus >= 1:
        why = f"{free_cpus:g} of the cluster's {num_cpus:g} CPUs are free, so reading is slow"
    else:
        why = (
            f"none of the cluster's {num_cpus:g} CPUs is free to decode on. If workers or other jobs hold them, use "
            "fewer workers, or scaling.resources_per_worker={CPU: 0.5}; if not, reading is slow"
        )
    return f"nothing decoded for {seconds:.0f} s: {why}"


class _Window:
    """The block that is being read; returns its rows in the requested order."""

    def __init__(
        self,
        blocks: Iterator[Block],
        on_bad: Callable[[list[BadSample]], None],
        on_block: Callable[[Block], None] = lambda _: None,
        by_plane: bool = False,
    ) -> None:
        """by_plane: whether images in blocks have their channels before their height."""
        self._blocks, self._on_bad, self._on_block, self._by_plane = blocks, on_bad, on_block, by_plane
        self._block: Block | None = None
        self._used = 0

    def take(self, samples: Int64s) -> Taken:
        """Return the next rows, which must be those of `samples`. Images from one block are not copied."""
        parts = list(self._next_rows(len(samples)))
        columns = ([part[name] for part in parts] for name in ("image", "label", "sample", "error"))
        image, label, sample, error = (
            found[0] if len(found) == 1 and found[0].ndim > 1 else np.concatenate(found) for found in columns
        )
        if not np.array_equal(sample, samples):
            raise RuntimeError("the pipeline returned other samples than requested")
        bad = error != ""
        image = image.transpose(0, 2, 3, 1) if self._by_plane else image
        return Taken(image, label, ~bad if bad.any() else None)

    def _next_rows(self, count: int) -> Iterator[Block]:
        while count:
            if self._block is None or self._used == len(self._block["sample"]):
                self._block, self._used = self._next_block(), 0
            end = min(self._used + count, len(self._block["sample"]))
            yield {name: values[self._used : end] for name, values in self._block.items()}
            count -= end - self._used
            self._used = end

    def _next_block(self) -> Block:
        block = next(self._blocks, None)
        if block is None:
            raise RuntimeError("the pipeline ended before all requested samples were decoded")
        if errors := {error: None for error in block["error"].tolist() if error}:  # two epochs may share a block
            self._on_bad([bad_sample(error) for error in errors])
        self._on_block(block)
        return block
