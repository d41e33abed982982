"""The batches and rows that a job reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from ftexp.data.augment.erasing import Erasing
from ftexp.data.augment.mixing import Mixing
from ftexp.data.augment.picture import view_positions
from ftexp.data.augment.resizing import Resizing
from ftexp.data.batches import Batch, MicroBatch
from ftexp.data.feeds.feed import Feed, Rows, ToTensors
from ftexp.job.skipped_batches import SkippedBatches


@dataclass(kw_only=True)
class TrainingData:
    """Where batches come from, and what is done to them before a step."""

    feed: Feed
    rows: dict[str, Rows]  # by split, for evaluation
    to_tensors: ToTensors
    accumulate_steps: int  # micro-batches of a step: more than configured once memory has run out
    resizing: Resizing | None = None
    erasing: Erasing | None = None
    mixing: Mixing | None = None
    splits: int = 1  # views of each sample in a micro-batch's images
    skipped: SkippedBatches = field(default_factory=SkippedBatches)
    current: Batch | None = None  # that is being trained on

    @property
    def image_size(self) -> int | None:
        """Pixels of the images of the last batch, where that changes with the step; else None."""
        if self.resizing is None or self.current is None:
            return None
        return self.resizing.size_at(self.current.start)

    def augmented(self, micro: MicroBatch, start: int) -> MicroBatch:
        """Resize, erase and mix as the config asks for it, in the global batch that begins at position `start`.

        The latter two draw from global generators, which the step seeds afterwards; so this is done on the thread that
        trains.
        """
        if self.resizing is not None:  # first, so that what is erased and mixed is less
            micro = dataclasses.replace(micro, images=self.resizing(micro.images, start))
        if self.erasing is not None:
            micro = dataclasses.replace(micro, images=self._erased(micro, self.erasing))
        return micro if self.mixing is None else self.mixing(micro, start)

    def _erased(self, micro: MicroBatch, erasing: Erasing) -> Tensor:
        """Erase in place; of several views, the first stays as it is."""
        if self.splits == 1:
            return erasing(micro.images, micro.positions)
        views = view_positions(micro.positions, self.splits)
        for view in range(1, self.splits):
            erasing(micro.images[view :: self.splits], views[view :: self.splits])
        return micro.images
