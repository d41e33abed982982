"""The samples that an epoch draws: position -> sample, a pure function of (seed, position), as in ftexp.data.order.

An epoch always has as many positions as there are training samples. `data.sampling` determines the samples:

shuffle   each sample once
balanced  all classes equally often: counts differ by at most one, and the classes with one more rotate over epochs
sqrt      classes in proportion to the square root of their size, in whole draws per epoch, each class at least once

`ClassOrder` implements balanced and sqrt. A Feistel permutation of (seed, epoch) assigns the draws of an epoch to
classes. Each class has its own sequence of permutations of its members, and its draws take the next members. The number
of a class's earlier draws has a closed form. So after any number of whole epochs, the members of a class have been
drawn equally often, within one.

`RepeatedOrder` implements repeated augmentation (Hoffer et al., "Augment your batch", 2020): each draw has several
positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ftexp.config.schema import Config
from ftexp.data.info import DataInfo
from ftexp.data.order import (
    AnyOrder,
    Int64s,
    SampleOrder,
    WindowOrder,
    derive_seed,
    derive_seeds,
    permute,
    permute_each,
    round_keys,
)

_STREAM = 1  # stream of the run's seed, separate from those of ftexp.job.build and ftexp.worker.step
_FRACTION_BITS = 40  # a count is shifted left by this before its integer square root, for precision


@dataclass(frozen=True)
class ClassTable:
    """The training samples by class. Takes 4 bytes per sample; 8 bytes if there are 2**31 samples or more."""

    members: npt.NDArray[np.signedinteger[Any]]  # sample numbers, sorted by class, [num_samples]
    counts: Int64s  # number of samples of each class, [num_classes]

    @classmethod
    def of(cls, labels: Int64s, num_classes: int) -> ClassTable:
        """Sort samples by class. labels: class of each sample, [num_samples]."""
        dtype = np.int32 if len(labels) < 2**31 else np.int64
        return cls(np.argsort(labels, kind="stable").astype(dtype), np.bincount(labels, minlength=num_classes))


@dataclass(frozen=True)
class Quotas:
    """Number of draws of each class in an epoch of `num_draws`: `whole`, and the remainder rotates over the classes."""

    whole: Int64s  # draws of each class in every epoch, [num_classes]
    num_draws: int

    @classmethod
    def of(cls, sampling: str, counts: Int64s, num_draws: int) -> Quotas:
        """Return the quotas for `data.sampling`. counts: number of samples of each class, all above 0."""
        if sampling == "balanced":
            return cls(np.full(len(counts), num_draws // len(counts)), num_draws)
        assert sampling == "sqrt", "a choice of the schema"
        assert num_draws >= len(counts), "ftexp.data.build refuses it"
        # integers, whose sums and quotients are the same on every machine
        roots = [math.isqrt(int(count) << _FRACTION_BITS) for count in counts]
        return cls(np.array(_apportioned(roots, num_draws), np.int64), num_draws)

    def before(self, epoch: int) -> Int64s:
        """Return the number of draws of each class in all epochs before `epoch`, [num_classes]."""
        num_classes, rest = len(self.whole), self.num_draws - int(self.whole.sum())
        # the sum of floor((x + c) / n) over c = 0 .. n - 1 is x (Hermite)
        return epoch * self.whole + (epoch * rest + np.arange(num_classes)) // num_classes


def _apportioned(weights: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to `weights` into integers of at least 1, by the largest remainder method.

    Among equal remainders, the earlier one gets more.
    """
    parts = dict.fromkeys(range(len(weights)), 1)
    shared = set(parts)
    while True:
        left, weight = total - (len(weights) - len(shared)), sum(weights[number] for number in shared)
        if not (low := {number for number in shared if left * weights[number] < weight}):
            break
        shared -= low  # each gets 1, although its share is less
    parts |= {number: left * weights[number] // weight for number in shared}
    by_remainder = sorted(shared, key=lambda number: (-(left * weights[number] % weight), number))
    for number in by_remainder[: total - sum(parts.values())]:
        parts[number] += 1
    return list(parts.values())


class ClassOrder:
    """Draws by class: draw -> sample. An epoch has `quotas.num_draws` draws and costs one pass over all classes."""

    def __init__(self, seed: int, table: ClassTable, quotas: Quotas) -> None:
        """quotas: for the classes that have samples."""
        self._seed, self._members, self._quotas = seed, table.members, quotas
        self._classes = np.flatnonzero(table.counts)
        self._counts = table.counts[self._classes]
        self._first_places = np.cumsum(self._counts) - self._counts
        assert len(self._classes) == len(quotas.whole)

    def samples(self, positions: Int64s) -> Int64s:
        """Return the sample of each draw; `positions` is any shape of non-negative integers."""
        samples: Int64s = self._members[self.places(positions)].astype(np.int64)
        return samples

    def places(self, positions: Int64s) -> Int64s:
        """Return the place of each draw's sample in `ClassTable.members`."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self._quotas.num_draws)
        rows, visits = np.empty_like(offsets), np.empty_like(offsets)  # the class, and its number of earlier draws
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            slots = permute(offsets[here], self._quotas.num_draws, round_keys(self._seed, epoch))
            before = self._quotas.before(epoch)
            ends = np.cumsum(self._quotas.before(epoch + 1) - before)
            rows[here] = row = np.searchsorted(ends, slots, side="right")
            visits[here] = before[row] + slots - np.where(row > 0, ends[row - 1], 0)
        rounds, members = np.divmod(visits, self._counts[rows])
        seeds = derive_seeds(self._seed, self._classes[rows].ravel(), rounds.ravel())
        chosen = permute_each(members.ravel(), self._counts[rows].ravel(), seeds)
        places: Int64s = self._first_places[rows] + chosen.reshape(rows.shape)
        return places


@dataclass(frozen=True)
class RepeatedOrder:
    """Each draw of `order` at `repeats` positions, far apart in one global batch: position -> sample.

    Each epoch of `num_samples` positions has ceil(num_samples / repeats) draws; the last draw has fewer positions if
    the division has a remainder. A draw that doesn't fit into a global batch continues in the next.
    """

    order: AnyOrder
    num_samples: int
    repeats: int
    global_batch_size: int

    def samples(self, positions: Int64s) -> Int64s:
        """Return the sample at each position; `positions` is any shape of non-negative integers."""
        return self.order.samples(self.draws(positions))

    def draws(self, positions: Int64s) -> Int64s:
        """Return the draw of `order` at each position."""
        positions = np.asarray(positions, np.int64)
        epochs = positions // self.num_samples
        # the part of a global batch in one epoch is divided into stretches; the copies of a sample go to consecutive
        # stretches, as timm's RepeatAugSampler distributes them to ranks
        batch = positions // self.global_batch_size * self.global_batch_size
        starts = np.maximum(batch, epochs * self.num_samples)
        sizes = np.minimum(batch + self.global_batch_size, (epochs + 1) * self.num_samples) - starts
        size, num_longer = np.divmod(sizes, self.repeats)  # size of a stretch; the first `num_longer` are longer by one
        offsets = positions - starts
        in_longer = offsets < num_longer * (size + 1)
        stretches = np.where(in_longer, offsets // (size + 1), (offsets - num_longer) // np.maximum(size, 1))
        places = offsets - stretches * size - np.minimum(stretches, num_longer)
        dealt = starts - epochs * self.num_samples + places * self.repeats + stretches
        draws: Int64s = epochs * num_draws(self.num_samples, self.repeats) + dealt // self.repeats
        return draws


def num_draws(num_samples: int, repeats: int) -> int:
    """Return the number of draws in an epoch of `num_samples` positions, if each draw has `repeats` positions."""
    return -(-num_samples // repeats)


def run_order(config: Config, num_samples: int, block_sizes: Int64s | None, table: ClassTable | None) -> AnyOrder:
    """Return the order of a run.

    Args:
        config: config of the run.
        num_samples: number of training samples.
        block_sizes: number of samples in each block, for data.shuffle_window.
        table: classes of the training samples, for data.sampling; None for shuffle.
    """
    seed, window, repeats = derive_seed(config.seed, _STREAM), config.data.shuffle_window, config.augment.repeats
    order: AnyOrder
    if config.data.sampling != "shuffle":
        assert table is not None, "made by ftexp.data.build.drawn_by_class"
        present = table.counts[table.counts > 0]
        order = ClassOrder(seed, table, Quotas.of(config.data.sampling, present, num_draws(num_samples, repeats)))
    elif window is None:
        order = SampleOrder(seed, num_samples)
    else:
        assert block_sizes is not None, "data.shuffle_window is refused for other sources"
        order = WindowOrder(seed, block_sizes, window)
    return order if repeats == 1 else RepeatedOrder(order, num_samples, repeats, config.train.global_batch_size)


def identities(
    config: Config, num_samples: int, class_counts: Sequence[int] | None
) -> Callable[[Sequence[int]], tuple[Int64s, Int64s]] | None:
    """Return a function for checks of the sample ledger: positions -> (rounds, places). It needs no data.

    Two positions of the same round have the same sample if and only if their places are equal. None for a run that
    draws each sample once per epoch.
    """
    repeats = config.augment.repeats
    if config.data.sampling != "shuffle":
        table = ClassTable(np.arange(num_samples), np.array(class_counts, np.int64))
        order = run_order(config, num_samples, None, table)
        return lambda positions: (np.zeros(len(positions), np.int64), order.samples(np.array(positions)))
    if repeats == 1:
        return None
    repeated = RepeatedOrder(SampleOrder(0, num_samples), num_samples, repeats, config.train.global_batch_size)
    return lambda positions: np.divmod(repeated.draws(np.array(positions)), num_samples)


def epoch_in_words(config: Config, info: DataInfo) -> str:
    """Return a description of the samples that an epoch draws, for the run's header."""
    positions, repeats = info.num_samples["train"], config.augment.repeats
    draws = num_draws(positions, repeats)
    versions = f", each in {repeats} versions (augment.repeats={repeats})" if repeats > 1 else ""
    if info.class_counts is None:
        if not versions:
            return f"{positions:,} samples, each once"
        return f"{draws:,} of the {positions:,} samples{versions}; every sample in {repeats} epochs"
    counts = np.array(info.class_counts, np.int64)
    classes = np.flatnonzero(counts)
    quotas = Quotas.of(config.data.sampling, counts[classes], draws)
    if config.data.sampling == "balanced":
        lowest, rest = divmod(draws, len(classes))
        shares = np.full(len(classes), draws / len(classes))
        how = f"{lowest:,}{f' or {lowest + 1:,}' if rest else ''} of each of {len(classes):,} classes"
    else:
        shares = quotas.whole.astype(np.float64)
        how = f"{quotas.whole.min():,} to {quotas.whole.max():,} of each of {len(classes):,} classes"
    times = repeats * shares / counts[classes]
    named = [
        f"each of the {counts[classes[row]]:,} samples of {info.class_names[classes[row]]!r} {times[row]:.3g} times"
        for row in (int(times.argmax()), int(times.argmin()))
    ]
    extremes = ", ".join(dict.fromkeys(named))  # one entry if all classes have the same size
    none = len(counts) - len(classes)
    left = f"; {none:,} class{'es have' if none > 1 else ' has'} no training sample, so no draw" if none else ""
    return f"{draws:,} draws{versions}, {how} (data.sampling={config.data.sampling}): {extremes}{left}"
