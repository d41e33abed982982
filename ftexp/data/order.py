"""Which sample when: a pure function of (seed, position), with no state and no I/O.

Position p of a run over `num_samples` samples belongs to epoch `p // num_samples`. Each epoch visits every
sample once, in an order drawn from (seed, epoch) by a Feistel network, evaluated at any position at the same
cost and without a permutation in memory (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002:
cycle-walking). Nothing here knows the number of workers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(values: UInt64s) -> UInt64s:
    """SplitMix64's output function: spreads every input bit over all 64 output bits (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_seed(*parts: int) -> int:
    """Hash whole numbers into one 64-bit seed; the order of `parts` matters."""
    state = 0
    for part in parts:
        state = _mix_int((state + (part + 1) * _GOLDEN) & _MASK)
    return state


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniforms(seed: int, positions: Int64s, draw: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one a position: draw number `draw` of each sample's own random stream."""
    counters = positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(derive_seed(seed, draw))
    return (mix(mix(counters)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Order:
    """The sequence of samples of a run: position -> (epoch, sample), `0 <= sample < num_samples`."""

    seed: int
    num_samples: int

    def __post_init__(self) -> None:
        assert self.num_samples > 0, "sources refuse an empty split"

    def epoch_of(self, position: int) -> int:
        """The epoch that `position` belongs to."""
        return position // self.num_samples

    def samples(self, positions: Int64s) -> Int64s:
        """The sample at each position; `positions` is any shape of non-negative integers."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._permute(offsets[here], int(epoch))
        return samples

    def _permute(self, offsets: Int64s, epoch: int) -> Int64s:
        num_bits = max(2, (self.num_samples - 1).bit_length())
        keys = _round_keys(self.seed, epoch)
        values = _feistel(offsets.astype(np.uint64), num_bits, keys)
        # the network permutes a domain of up to twice num_samples: walk on until inside
        while (outside := np.flatnonzero(values >= np.uint64(self.num_samples))).size:
            values[outside] = _feistel(values[outside], num_bits, keys)
        return values.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(derive_seed(seed, epoch, number)) for number in range(_NUM_ROUNDS))


def _feistel(values: UInt64s, num_bits: int, keys: tuple[np.uint64, ...]) -> UInt64s:
    """A permutation of [0, 2**num_bits): Feistel rounds that change the high and the low bits in turn."""
    low_bits = np.uint64(num_bits // 2)
    low_mask, high_mask = np.uint64((1 << (num_bits // 2)) - 1), np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (mix(high + key) & low_mask)
        else:
            high = high ^ (mix(low + key) & high_mask)
    return (high << low_bits) | low
