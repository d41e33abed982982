"""Permutations that give a sample at any position: pure functions of (seed, position), with no state and no I/O.

Position p of a run over `num_samples` samples belongs to epoch `p // num_samples`. Each epoch visits every sample once,
in an order drawn from (seed, epoch) by a Feistel network. The network is evaluated at any position at the same cost,
without a permutation in memory (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: cycle-walking). The
order does not depend on the number of workers.

If samples can only be read in blocks (row groups, ranges of a tar file), `WindowOrder` shuffles the blocks, and then
the rows of a few blocks at a time. Every sample still occurs once per epoch, but rows of one block stay close to each
other: if a file is sorted by class, batches are partly sorted too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(values: UInt64s) -> UInt64s:
    """Apply SplitMix64's output function: spread every input bit over all 64 output bits (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_seed(*parts: int) -> int:
    """Hash integers into one 64-bit seed; the order of `parts` matters."""
    state = 0
    for part in parts:
        state = _mix_int((state + (part + 1) * _GOLDEN) & _MASK)
    return state


def derive_seeds(seed: int, *parts: Int64s) -> UInt64s:
    """Return `derive_seed(seed, *parts)` for each row; `parts` are non-negative, each [rows]."""
    states = np.full(parts[0].shape, derive_seed(seed), np.uint64)
    for part in parts:
        states = mix(states + (part.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return states


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniforms(seed: int, positions: Int64s, draw: int) -> npt.NDArray[np.float64]:
    """Return uniform numbers in [0, 1), one per position: draw number `draw` of the position's random stream."""
    counters = positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(derive_seed(seed, draw))
    return (mix(mix(counters)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class AnyOrder(Protocol):
    """A sequence of samples: position -> sample."""

    def samples(self, positions: Int64s) -> Int64s:
        """Return the sample at each position; `positions` is any shape of non-negative integers."""
        ...


@dataclass(frozen=True)
class SampleOrder:
    """The shuffled sequence of a run's samples: position -> sample, `0 <= sample < num_samples`."""

    seed: int
    num_samples: int

    def __post_init__(self) -> None:
        assert self.num_samples > 0, "sources refuse an empty split"

    def samples(self, positions: Int64s) -> Int64s:
        """Return the sample at each position; `positions` is any shape of non-negative integers."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = permute(offsets[here], self.num_samples, round_keys(self.seed, int(epoch)))
        return samples


class _Epoch(NamedTuple):
    """The order of blocks in one epoch; the arrays are in this order."""

    first_samples: Int64s  # first sample of each block
    block_ends: Int64s  # offset in the epoch at which each block ends before rows are shuffled
    window_ends: Int64s  # offset in the epoch at which each window ends


class WindowOrder:
    """Blocks of samples in a new order each epoch, with the rows of each `window` blocks shuffled together.

    Block b holds the next `block_sizes[b]` samples. Each epoch costs one pass over all block sizes.
    """

    def __init__(self, seed: int, block_sizes: Int64s, window: int) -> None:
        self.num_samples = int(block_sizes.sum())
        assert self.num_samples > 0, "sources refuse an empty split"
        self._seed, self._sizes, self._window = seed, block_sizes, window
        self._first_samples = np.cumsum(block_sizes) - block_sizes
        self._epochs: dict[int, _Epoch] = {}  # by epoch; the last two

    def samples(self, positions: Int64s) -> Int64s:
        """Return the sample at each position; `positions` is any shape of non-negative integers."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        samples = np.empty_like(offsets)
        for number in np.unique(epochs):
            epoch = self._epoch(int(number))
            windows = np.searchsorted(epoch.window_ends, offsets, side="right")
            for window in np.unique(windows[epochs == number]):
                here = (epochs == number) & (windows == window)
                start = int(epoch.window_ends[window - 1]) if window else 0
                size = int(epoch.window_ends[window]) - start
                keys = round_keys(self._seed, int(number), 1 + int(window))
                shuffled = start + permute(offsets[here] - start, size, keys)
                block = np.searchsorted(epoch.block_ends, shuffled, side="right")
                row = shuffled - np.where(block > 0, epoch.block_ends[block - 1], 0)
                samples[here] = epoch.first_samples[block] + row
        return samples

    def _epoch(self, number: int) -> _Epoch:
        # called on two threads, the training loop's and the pipeline's: replace the dict, never modify it
        epochs = self._epochs
        if number not in epochs:
            count = len(self._sizes)
            blocks = permute(np.arange(count), count, round_keys(self._seed, number))
            ends = np.cumsum(self._sizes[blocks])
            last = np.minimum(np.arange(self._window, count + self._window, self._window), count) - 1
            made = _Epoch(self._first_samples[blocks], ends, ends[last])
            self._epochs = epochs = {n: e for n, e in epochs.items() if n == number - 1} | {number: made}
        return epochs[number]


def permute(offsets: Int64s, size: int, keys: tuple[np.uint64, ...]) -> Int64s:
    """Apply the permutation of [0, size) that `keys` select to each of `offsets`."""
    num_bits = np.uint64(max(2, (size - 1).bit_length()))
    values = _feistel(offsets.astype(np.uint64), num_bits, keys)
    # the network permutes a domain of up to twice the size: apply it again until the value is inside
    while (outside := np.flatnonzero(values >= np.uint64(size))).size:
        values[outside] = _feistel(values[outside], num_bits, keys)
    return values.astype(np.int64)


def permute_each(offsets: Int64s, sizes: Int64s, seeds: UInt64s) -> Int64s:
    """Apply `permute` with a separate permutation per row: of [0, sizes[row]), selected by seeds[row]; all [rows]."""
    num_bits = np.maximum(2, np.frexp(sizes - 1.0)[1]).astype(np.uint64)  # exact below 2**53
    keys = [mix(seeds + np.uint64(number * _GOLDEN & _MASK)) for number in range(1, _NUM_ROUNDS + 1)]
    values = _feistel(offsets.astype(np.uint64), num_bits, keys)
    while (outside := np.flatnonzero(values >= sizes.astype(np.uint64))).size:
        values[outside] = _feistel(values[outside], num_bits[outside], [key[outside] for key in keys])
    return values.astype(np.int64)


@functools.lru_cache(maxsize=64)
def round_keys(seed: int, *stream: int) -> tuple[np.uint64, ...]:
    """Return the keys of the permutation that a seed and the numbers of a stream select."""
    return tuple(np.uint64(derive_seed(seed, *stream, number)) for number in range(_NUM_ROUNDS))


def _feistel(values: UInt64s, num_bits: np.uint64 | UInt64s, keys: Sequence[np.uint64 | UInt64s]) -> UInt64s:
    """Apply a permutation of [0, 2**num_bits): Feistel rounds that change the high and the low bits in turn.

    num_bits, keys: one for all `values`, or one per value.
    """
    low_bits = num_bits // np.uint64(2)
    low_mask, high_mask = _ones(low_bits), _ones(num_bits - low_bits)
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (mix(high + key) & low_mask)
        else:
            high = high ^ (mix(low + key) & high_mask)
    return (high << low_bits) | low


def _ones(num_bits: np.uint64 | UInt64s) -> np.uint64 | UInt64s:
    return (np.uint64(1) << num_bits) - np.uint64(1)
