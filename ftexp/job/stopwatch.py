"""A step's time on one rank, by section: waiting for data, forward and backward pass, optimiser, saving.

On a GPU, sections of a step are separated by events in the stream. They are read at a logged point, where the loop
waits for the GPU anyway, so nothing is synchronised for them. Waiting for data and for a checkpoint is timed on the
host.

Within a section, a rank may wait for others, which says nothing about its own speed. The time from `wait` to `go_on`,
or to the section's end, is not the rank's own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

FEED, FORWARD, BACKWARD, OPTIMIZER, SAVE = SECTIONS = ("feed", "forward", "backward", "optimizer", "save")
TEACHER = "teacher"  # the section of a run that distils
OWN = (FEED, TEACHER, FORWARD, BACKWARD, OPTIMIZER)  # sections whose own time is compared between ranks
# time of a step without waiting for others, over ranks: minimum, (lower) median, maximum, and the rank of the maximum
RANKS = ("rank_ms_min", "rank_ms_median", "rank_ms_max", "slowest_rank")
# keys of a logged point that differ from run to run; `<section>_ms` is the mean over the steps since the last point
SPEEDS = ("images_per_s", "mfu", "feed_queue", *(f"{section}_ms" for section in (*SECTIONS, TEACHER)), *RANKS)

T = TypeVar("T")


class Stopwatch:
    """Adds up seconds by section: `lap` within a step; `feeding`, `section` and `apart` outside of it.

    device: device on which `lap` measures; None: the host.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._on_gpu = device is not None and device.type == "cuda"
        self._spent = dict.fromkeys(SECTIONS, 0.0)  # seconds since the last point
        self._waited = dict.fromkeys(SECTIONS, 0.0)  # the part of `_spent` that was waiting for others
        self._laps: list[tuple[str, Any, Any]] = []  # (section, event at its start, at its end), to be read
        self._waits: list[tuple[str, Any, Any]] = []  # likewise
        self._in_lap: list[tuple[Any, Any]] = []  # (begin, end) of waits since the last lap
        self._waits_since: Any = None  # start of the current wait; None: not waiting
        self._used: list[Any] = []  # events since the last point
        self._free: list[Any] = []  # events to reuse
        self._mark: Any = None  # start of the current section
        self._since, self._apart_s, self._is_apart = clock(), 0.0, False
        self._num_steps = self._position = 0
        self._queued = self._num_asked = 0  # sum of the ready batches at each request; number of requests

    def feeding(self, batches: Generator[T], position: Callable[[], int]) -> Generator[T]:
        """Yield `batches`, timing the wait for each; `position` returns how many samples are done."""
        self._since, self._position = self._clock(), position()
        with contextlib.closing(batches):
            while True:
                began = self._clock()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self._spent[FEED] += self._clock() - began
                self._num_steps += 1
                self.begin()
                yield batch

    def note_queue(self, num_ready: int) -> None:
        """Note that a batch is requested while `num_ready` are ready; not called if none are prepared ahead."""
        self._queued += num_ready
        self._num_asked += 1

    def begin(self) -> None:
        """Start timing a section; the next `lap` names it."""
        self._mark, self._in_lap, self._waits_since = self._now(), [], None

    def lap(self, section: str) -> None:
        """Add the time since the last lap, or since the step's start, to `section`."""
        now = self._now()
        if self._waits_since is not None:
            self._in_lap.append((self._waits_since, now))
        waits, self._in_lap, self._waits_since = self._in_lap, [], None
        if self._mark is None:
            pass  # no step has begun
        elif self._on_gpu:
            self._laps.append((section, self._mark, now))
            self._waits += [(section, begin, end) for begin, end in waits]
        else:
            _add(self._spent, section, now - self._mark)
            _add(self._waited, section, sum(end - begin for begin, end in waits))
        self._mark = now

    def wait(self, only_from_now: bool = False) -> None:
        """Start a wait for other ranks. only_from_now: discard a wait that was started before."""
        if not self._is_apart and (self._waits_since is None or only_from_now):
            self._waits_since = self._now()

    def go_on(self) -> None:
        """End a wait for other ranks, if there is one."""
        if self._waits_since is not None:
            self._in_lap.append((self._waits_since, self._now()))
            self._waits_since = None

    def own_s(self) -> dict[str, float]:
        """Return the rank's own seconds per step since `take`, by section of OWN; waits for a GPU."""
        if self._used:
            self._used[-1].synchronize()
        self._read()
        steps = max(1, self._num_steps)
        return {name: (self._spent.get(name, 0.0) - self._waited.get(name, 0.0)) / steps for name in OWN}

    def _read(self) -> None:
        """Add up the times between the GPU's events, which must have completed."""
        for sums, laps in ((self._spent, self._laps), (self._waited, self._waits)):
            for section, start, end in laps:
                _add(sums, section, start.elapsed_time(end) / 1000)
            laps.clear()

    def _now(self) -> Any:
        if not self._on_gpu:
            return self._clock()
        import torch

        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._used.append(event)
        return event

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add the block's time to section `name`, by the host's clock."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent[name] += self._clock() - began

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Exclude the block's time from images/s: it is not training."""
        began, self._is_apart = self._clock(), True
        try:
            yield
        finally:
            self._apart_s += self._clock() - began
            self._is_apart = False

    def take(self, position: int) -> dict[str, float]:
        """Return `images_per_s` over all ranks and `<section>_ms` per step, since the last call.

        Also `feed_queue`, the mean number of ready batches when one was requested, if they are prepared ahead. Empty if
        there was no new sample. The GPU must have caught up.
        """
        self._read()
        self._free += self._used
        self._used, self._mark, self._in_lap, self._waits_since = [], None, [], None
        now = self._clock()
        seconds, samples, steps = now - self._since - self._apart_s, position - self._position, self._num_steps
        speeds = {}
        if samples > 0 and steps > 0 and seconds > 0:
            speeds = {f"{name}_ms": round(1000 * spent / steps, 3) for name, spent in self._spent.items()}
            speeds["images_per_s"] = round(samples / seconds, 1)
            if self._num_asked:
                speeds["feed_queue"] = round(self._queued / self._num_asked, 2)
        self._queued = self._num_asked = 0
        self._spent, self._waited = dict.fromkeys(SECTIONS, 0.0), dict.fromkeys(SECTIONS, 0.0)
        self._since, self._apart_s, self._num_steps, self._position = now, 0.0, 0, position
        return speeds


def _add(sums: dict[str, float], section: str, seconds: float) -> None:
    sums[section] = sums.get(section, 0.0) + seconds
