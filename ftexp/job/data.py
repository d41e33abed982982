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
    """The source of batches, and their processing before a step."""

    feed: Feed
    rows: dict[str, Rows]  # by split, for evaluation
    to_tensors: ToTensors
    accumulate_steps: int  # micro-batches per step: more than configured once memory has run out
    resizing: Resizing | None = None
    erasing: Erasing | None = None
    mixing: Mixing | None = None
    splits: int = 1  # views of each sample in a micro-batch's images
    skipped: SkippedBatches = field(default_factory=SkippedBatches)
    current: Batch | None = None  # the batch that is being trained on

    @property
    def image_size(self) -> int | None:
        """Size in pixels of the last batch's images, if it changes with the step; else None."""
        if self.resizing is None or self.current is None:
            return None
        return self.resizing.size_at(self.current.start)

    def augmented(self, micro: MicroBatch, start: int) -> MicroBatch:
        """Resize, erase and mix as configured; the global batch begins at position `start`.

        Erasing and mixing draw from global generators, which the step seeds afterwards, so this runs on the training
        thread.
        """
        if self.resizing is not None:  # first, so that fewer pixels are erased and mixed
            micro = dataclasses.replace(micro, images=self.resizing(micro.images, start))
        if self.erasing is not None:
            micro = dataclasses.replace(micro, images=self._erased(micro, self.erasing))
        return micro if self.mixing is None else self.mixing(micro, start)

    def _erased(self, micro: MicroBatch, erasing: Erasing) -> Tensor:
        """Erase in place; of several views, the first stays unchanged."""
        if self.splits == 1:
            return erasing(micro.images, micro.positions)
        views = view_positions(micro.positions, self.splits)
        for view in range(1, self.splits):
            erasing(micro.images[view :: self.splits], views[view :: self.splits])
        return micro.images
