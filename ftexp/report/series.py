"""Numbers for charts: curves downsampled so that spikes survive, and axes with round numbers."""

from __future__ import annotations

import bisect
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ftexp.report.source import RunFiles
from ftexp.report.timeline import Timeline

MAX_BUCKETS = 400  # buckets of a curve: about as many as a chart has pixels


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points of a curve, combined."""

    x: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Series:
    """A named curve. `role` gives its colour."""

    name: str
    role: str
    points: list[tuple[float, float]]

    @property
    def values(self) -> list[float]:
        """The y values."""
        return [y for _, y in self.points]

    def buckets(self, max_buckets: int = MAX_BUCKETS) -> list[Bucket]:
        """Return at most `max_buckets` buckets, each with its extremes; one for each point if there are fewer."""
        if len(self.points) <= max_buckets:
            return [Bucket(x, y, y, y) for x, y in self.points]
        first, last = self.points[0][0], self.points[-1][0]
        groups: dict[int, list[tuple[float, float]]] = {}
        for x, y in self.points:
            groups.setdefault(min(max_buckets - 1, int((x - first) / (last - first) * max_buckets)), []).append((x, y))
        return [_bucket(group) for _, group in sorted(groups.items())]


def _bucket(group: Sequence[tuple[float, float]]) -> Bucket:
    ys = [y for _, y in group]
    return Bucket(group[len(group) // 2][0], min(ys), statistics.fmean(ys), max(ys))


def curve(run: RunFiles, split: str, key: str, name: str, role: str) -> Series:
    """Return a metric by step; points that aren't numbers are excluded."""
    pairs = ((point["step"], point.get(key)) for point in run.split(split))
    return Series(name, role, [(float(x), float(y)) for x, y in pairs if isinstance(y, (int, float))])


def throughput(run: RunFiles, timeline: Timeline) -> list[tuple[float, float]]:
    """Return (step, images/s) between logged points without a start and, if possible, an evaluation between them."""
    size = run.config.get("train", {}).get("global_batch_size")
    if not isinstance(size, int):
        return []
    starts = sorted(when for _, when in timeline.attempts)
    evaluations = sorted(point["time"] for point in run.points if point["split"] != "train")
    pure: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    points = run.split("train")
    for before, after in pairwise(points):
        seconds = after["time"] - before["time"]
        if seconds <= 0 or _any_between(starts, before["time"], after["time"]):
            continue
        rate = (float(after["step"]), (after["step"] - before["step"]) * size / seconds)
        (others if _any_between(evaluations, before["time"], after["time"]) else pure).append(rate)
    return pure or others


def _any_between(times: list[float], first: float, last: float) -> bool:
    return bisect.bisect_right(times, first) < bisect.bisect_left(times, last)


@dataclass(frozen=True)
class Axis:
    """Mapping of values to [0, 1], with round numbers as ticks."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False, from_zero: bool = False) -> Axis:
        """Return an axis that contains all values, with a small margin."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if log and low > 0:
            return cls(low / 1.1, high * 1.1, True)
        low = min(low, 0.0) if from_zero else low
        room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        return cls(low if from_zero else low - room, high + room)

    def at(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, max_ticks: int = 6) -> list[float]:
        """Return round numbers on the axis, at most about `max_ticks`."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [digit * 10.0**power for power in powers for digit in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= max_ticks + 1:
                    return found
            return found[:: math.ceil(len(found) / max_ticks)]
        step = round_step((self.high - self.low) / max_ticks)
        first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_step(minimum: float) -> float:
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that isn't below `minimum`."""
    power = 10.0 ** math.floor(math.log10(minimum))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= minimum * 0.999)


def short(value: float) -> str:
    """Return a number for an axis: 20k, 0.05, 1e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return seconds in words: 785 ms, 43.1 s, 12 min 3 s, 5 h 20 min."""
    if seconds < 100:
        return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"


def minute(when: float) -> str:
    """Return a time, seconds since 1970, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
