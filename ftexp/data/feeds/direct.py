"""Rows that are decoded in the process that uses them: for tasks that must not wait for CPUs of other tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from ftexp.data.feeds.decoding import decode_samples
from ftexp.data.feeds.feed import Request, Take, Taken
from ftexp.data.info import BadSample, DataInfo, IndexedSplit
from ftexp.data.order import Int64s


class DirectRows:
    """A split's rows for evaluation: whole images, fitted. `on_bad` is called with samples that can't be read."""

    def __init__(self, split: IndexedSplit, info: DataInfo, on_bad: Callable[[list[BadSample]], None]) -> None:
        self._split, self._fit, self._on_bad = split, info.fit, on_bad

    def __len__(self) -> int:
        return self._split.num_samples

    @property
    def labels(self) -> Int64s:
        """The class of each sample, [num_samples]."""
        return self._split.table.get()[1]

    def open(self, requests: Iterator[Request]) -> AbstractContextManager[Take]:  # noqa: ARG002 - nothing is prepared
        """Do nothing: nothing has to be prepared."""
        return nullcontext(self.take)

    def take(self, samples: Int64s) -> Taken:
        """Decode samples."""
        images, outcome = decode_samples(self._split, samples, self._fit)
        bad = np.array([reason != "" for reason in outcome.reasons])
        if bad.any():
            found = zip(outcome.places, outcome.reasons, strict=True)
            self._on_bad([BadSample(where, why) for where, why in found if why])
        return Taken(images, self.labels[samples], ~bad if bad.any() else None)

    def costs_ms(self) -> dict[str, float]:
        """Return {}: no task makes these rows."""
        return {}
