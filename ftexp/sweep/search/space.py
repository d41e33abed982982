"""The search space: keys with choices or intervals in Hydra's override grammar. A word is a value as typed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from ftexp.errors import ConfigError

_DIGITS = 4  # significant digits of a drawn number: it names a directory, and more digits mean nothing
_EXAMPLE = "optim.lr=tag(log, interval(1e-4, 1e-2))"


@dataclass(frozen=True)
class Options:
    """A key with a choice of words. The value that a sampler draws is a word's index."""

    key: str  # as in an override: with + or ++ if Hydra needs it
    words: tuple[str, ...]
    is_ordered: bool  # steps of a range, whose neighbours are similar

    @property
    def num_words(self) -> int:
        """Number of different words."""
        return len(self.words)

    @property
    def all_words(self) -> Iterable[str]:
        """Every word that may be drawn."""
        return self.words

    @property
    def ends(self) -> Sequence[str]:
        """Words whose validity implies that all are valid."""
        return self.words

    def word(self, value: int) -> str:
        """Return the word of a drawn value."""
        return self.words[value]

    def value(self, word: str) -> int | None:
        """Return the value of a word; None if it is not one of `words`."""
        return self.words.index(word) if word in self.words else None


@dataclass(frozen=True)
class Interval:
    """A key with a number from `low` to `high`, both included; an integer if both are integers."""

    key: str
    low: float
    high: float
    is_log: bool

    @property
    def is_whole(self) -> bool:
        """Whether the numbers are integers."""
        return isinstance(self.low, int)

    @property
    def num_words(self) -> int | None:
        """Number of different words; None if the interval is real."""
        return int(self.high) - int(self.low) + 1 if self.is_whole else None

    @property
    def all_words(self) -> Iterable[str]:
        """Every word that may be drawn from an interval of integers, which may be very many."""
        return map(str, range(int(self.low), int(self.high) + 1))

    @property
    def ends(self) -> Sequence[str]:
        """Words whose validity implies that all are valid."""
        return (self.word(self.low), self.word(self.high))

    def word(self, value: float) -> str:
        """Return the word of a drawn value, with few digits."""
        if self.is_whole:
            return str(int(value))
        return repr(min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high))

    def value(self, word: str) -> float | None:
        """Return the value of a word; None if it is outside of the interval, or no such number."""
        try:
            number = int(word) if self.is_whole and word.lstrip("-").isdigit() else float(word)
        except ValueError:
            return None
        return number if self.low <= number <= self.high and isinstance(number, int) == self.is_whole else None


Dimension = Options | Interval


def plain_key(dimension: Dimension) -> str:
    """Return the key without a leading + or ++."""
    return dimension.key.lstrip("+")


def read_space(overrides: Sequence[Override]) -> tuple[list[str], list[Dimension]]:
    """Return the overrides that all trials share, and the dimensions in which they differ, sorted by key.

    Later overrides win, as in Hydra.

    ConfigError for an empty dimension, or if there is no dimension.
    """
    fixed: dict[str, str] = {}
    space: dict[str, Dimension] = {}
    for override in overrides:
        key = override.get_key_element()
        fixed.pop(key, None)
        space.pop(key, None)
        if not override.is_sweep_override():
            fixed[key] = override.input_line or key
        else:
            space[key] = _dimension(key, override)
    if not space:
        raise ConfigError(
            f"hydra/sweeper=tune has no key to search: give a key several values, such as '{_EXAMPLE}', "
            "model=vit,resnet18 or 'train.accumulate_steps=int(interval(1, 4))'"
        )
    return list(fixed.values()), sorted(space.values(), key=plain_key)


def inside(space: Sequence[Dimension], words: dict[str, str]) -> bool:
    """Return whether a proposal, {plain key: word}, is a point of the space."""
    keys = {plain_key(dimension) for dimension in space}
    return keys == words.keys() and all(each.value(words[plain_key(each)]) is not None for each in space)


def num_points(space: Sequence[Dimension]) -> int | None:
    """Return the number of points of the space; None if one of its intervals is real."""
    counts = [dimension.num_words for dimension in space]
    return math.prod(count for count in counts if count is not None) if None not in counts else None


def all_points(space: Sequence[Dimension]) -> Iterator[dict[str, str]]:
    """Yield every point of a space without real intervals."""
    if not space:
        yield {}
        return
    first, *others = space
    for word in first.all_words:
        for point in all_points(others):
            yield {plain_key(first): word, **point}


def probes(space: Sequence[Dimension]) -> list[dict[str, str]]:
    """Return points that cover every option and both ends of every interval, to check each."""
    count = max(len(dimension.ends) for dimension in space)
    return [{plain_key(each): each.ends[i % len(each.ends)] for each in space} for i in range(count)]


def _dimension(key: str, override: Override) -> Dimension:
    typed, sweep = f"{key}={override.get_value_string()}", override.value()
    tags: set[str] = getattr(sweep, "tags", set())
    if unknown := tags - {"log"}:
        raise ConfigError(f"{typed}: the tag {min(unknown)} is unknown; the only tag is log")
    if isinstance(sweep, IntervalSweep):
        return _interval(key, typed, sweep)
    if tags:
        raise ConfigError(f"{typed}: the tag log needs an interval: {key}=tag(log, interval(...))")
    if isinstance(sweep, (ChoiceSweep, RangeSweep)):
        sweep.shuffle = False  # a seed's proposals depend on the order of the options
    words = tuple(override.sweep_string_iterator())
    if not words:
        raise ConfigError(f"{typed} holds no value: give at least one")
    if twice := sorted({word for word in words if words.count(word) > 1}):
        raise ConfigError(f"{typed} holds {', '.join(twice)} more than once: give each value once")
    return Options(key, words, is_ordered=isinstance(sweep, RangeSweep))


def _interval(key: str, typed: str, sweep: IntervalSweep) -> Interval:
    low: Any = sweep.start
    high: Any = sweep.end
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{typed}: an interval needs a lower and a higher number")
    if "log" in sweep.tags and low <= 0:
        raise ConfigError(f"{typed}: the tag log needs a lower bound above 0")
    return Interval(key, low, high, is_log="log" in sweep.tags)
