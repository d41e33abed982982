"""Feeds, which bring rows to a worker. A feed does one thing: iterate over batches from a position."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from ray.data import DataIterator
from torch import Tensor

from ftexp.data.augment.picture import view_positions
from ftexp.data.augment.pixels import Augment
from ftexp.data.batches import Batch, MicroBatch
from ftexp.data.feeds.decoding import PARTS
from ftexp.data.info import DataInfo
from ftexp.data.order import AnyOrder, Int64s
from ftexp.data.plan import MicroShare, ShardPlan, even_part
from ftexp.data.sources.arrays import UInt8s
from ftexp.data.targets import Float32s, Labels, is_packed, unpacked

T = TypeVar("T")

COSTS = tuple(f"{part}_ms" for part in PARTS)  # keys of a logged point: mean time per sample in the tasks
_LARGEST = np.float32(255)
_PLAN_ROWS = 2048  # positions looked up at a time: the permutation costs per call, not per row


class Feed(Protocol):
    """Source of a training loop's batches."""

    def from_position(self, position: int) -> Generator[Batch]:
        """Yield this rank's share of every global batch from `position` to the end of the run."""
        ...

    def shares(self, position: int) -> Iterator[Batch]:
        """Yield the same batches without micro-batches, so without reading data."""
        ...


@dataclass(frozen=True)
class Taken:
    """Decoded samples, in the requested order."""

    images: UInt8s  # [rows, image_size, image_size, channels]; may be read-only
    labels: Labels  # labels of each row
    readable: npt.NDArray[np.bool_] | None = None  # [rows]; None: all. Other rows have no image, and weight 0


Take = Callable[[Int64s], Taken]
Request = Int64s  # [2, rows]: samples and their positions; in evaluation, the samples twice


def request(samples: Int64s, positions: Int64s) -> Request:
    """Return the request for samples that will be taken for these positions."""
    return np.stack([samples, positions])


class Rows(Protocol):
    """Source of a split's decoded samples."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Labels:
        """The label of each sample."""
        ...

    def open(self, requests: Iterator[Request]) -> AbstractContextManager[Take]:
        """Prepare to take samples: in the order of `requests`, though any number at a time."""
        ...

    def costs_ms(self) -> dict[str, float]:
        """Return the mean of each of COSTS over the samples made since the last call; {} if none was made."""
        ...


class CachedRows:
    """A split's rows in the object store: read in place and gathered by index, never copied as a whole."""

    def __init__(self, dataset: DataIterator) -> None:
        blocks = list(dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
        self._images: list[UInt8s] = [block["image"] for block in blocks]
        sizes = [len(block) for block in self._images]
        samples = np.concatenate([block["sample"] for block in blocks]) if blocks else np.empty(0, np.int64)
        in_order = np.argsort(samples, kind="stable")  # blocks may arrive in any order
        labels = np.concatenate([block["label"] for block in blocks]) if blocks else np.empty(0, np.int64)
        self._labels: Labels = labels[in_order]
        self._block = np.repeat(np.arange(len(sizes)), sizes)[in_order]
        self._row = np.concatenate([np.arange(size) for size in sizes] or [np.empty(0, np.int64)])[in_order]

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Labels:
        """The label of each sample."""
        return self._labels

    def open(self, requests: Iterator[Request]) -> AbstractContextManager[Take]:  # noqa: ARG002 - any order is equally fast
        """Do nothing: nothing has to be prepared."""
        return nullcontext(self.take)

    def take(self, samples: Int64s) -> Taken:
        """Gather samples."""
        return Taken(self._gather(samples), self._labels[samples])

    def costs_ms(self) -> dict[str, float]:
        """Return {}: the samples are already decoded."""
        return {}

    def _gather(self, samples: Int64s) -> UInt8s:
        if len(self._images) == 1:
            return self._images[0].take(self._row[samples], axis=0)
        blocks, rows = self._block[samples], self._row[samples]
        gathered = np.empty((len(samples), *self._images[0].shape[1:]), np.uint8)
        for block in np.unique(blocks):
            here = blocks == block
            gathered[here] = self._images[block][rows[here]]
        return gathered


class Reused:
    """Memory for CPU tensors, reused once no tensor refers to it."""

    def __init__(self) -> None:
        self._kept: list[tuple[npt.NDArray[np.float32], weakref.ref[Any]]] = []
        self._lock = threading.Lock()  # a thread may prepare batches while another evaluates

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised float32 tensor."""
        size = math.prod(shape)
        with self._lock:
            kept = [(memory, user) for memory, user in self._kept if memory.size == size]  # a short batch is rare
            memory = next((memory for memory, user in kept if user() is None), None)
            if memory is None:
                memory = torch.empty(size).numpy()  # torch aligns to more bytes than numpy
            lent = memory[:]  # the tensor and all its views keep this reference
            self._kept = [(other, user) for other, user in kept if other is not memory] + [(memory, weakref.ref(lent))]
        return torch.from_numpy(lent).view(shape)


class ToTensors:
    """Conversion of uint8 rows to normalised float tensors on the device, [rows, channels, height, width]."""

    def __init__(self, info: DataInfo, device: torch.device, channels_last: bool) -> None:
        self._device = device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = torch.tensor(info.mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(info.std, device=device).view(1, -1, 1, 1)
        self._by_plane = device.type == "cpu" and not channels_last
        self._memory = Reused()
        self._num_outputs = info.num_classes
        self._standard: tuple[Float32s, Float32s] | None = None  # mean and std of each target
        if info.target_mean is not None and info.target_std is not None:
            self._standard = np.array(info.target_mean, np.float32), np.array(info.target_std, np.float32)

    def targets(self, labels: Labels) -> Tensor:
        """Return targets for a loss: int64 [rows], or float32 [rows, num_classes] of 0 and 1 or standardised values."""
        if is_packed(labels):
            labels = unpacked(labels, self._num_outputs).astype(np.float32)
        elif self._standard is not None:
            mean, std = self._standard
            labels = (labels - mean) / std
        return torch.from_numpy(labels).to(self._device, non_blocking=True)

    def __call__(self, rows: UInt8s, augment: Augment | None = None, positions: Int64s | None = None) -> Tensor:
        """Scale to 0..1, augment if `augment` is given, and normalise."""
        if augment is not None and positions is not None:
            rows = augment.pixels(rows, positions)
            if augment.changes_tensors:
                return self._normalised(augment(self._scaled(rows), positions))
        return self._by_planes(rows) if self._by_plane else self._normalised(self._scaled(rows))

    def _scaled(self, rows: UInt8s) -> Tensor:
        moved = torch.from_numpy(rows if rows.flags.writeable else rows.copy(order="K"))
        if self._device.type == "cuda":
            moved = moved.pin_memory().to(self._device, non_blocking=True)
        # in place: on a CPU, allocating memory costs more than the arithmetic
        return moved.permute(0, 3, 1, 2).to(torch.float32, memory_format=self._format).div_(255)

    def _normalised(self, images: Tensor) -> Tensor:
        return images.sub_(self._mean).div_(self._std)

    def _by_planes(self, rows: UInt8s) -> Tensor:
        """Return bitwise identical tensors in half the time or less: each plane stays in a core's cache."""
        count, height, width, channels = rows.shape
        images = self._memory.tensor((count, channels, height, width))
        mean, std = (values.flatten().numpy() for values in (self._mean, self._std))
        for planes, given in zip(images.numpy(), rows.transpose(0, 3, 1, 2), strict=True):
            for channel, plane in enumerate(planes):
                np.copyto(plane, given[channel])
                np.divide(plane, _LARGEST, out=plane)
                np.subtract(plane, mean[channel], out=plane)
                np.divide(plane, std[channel], out=plane)
        return images

    def pixels(self, images: Tensor) -> UInt8s:
        """Convert tensors of this object back to uint8 rows; the original rows if they were not augmented."""
        scaled = (images * self._std + self._mean).clamp(0, 1).mul(255).round()
        rows: UInt8s = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return rows


Share = tuple[MicroShare, Int64s]  # positions of a micro-batch, and the samples at them


def _counted(shares: list[Share]) -> tuple[Int64s, Int64s]:
    """Return the positions that count in a step, without padding and partners, and their samples."""
    positions = np.concatenate([share.positions[: share.num_counted] for share, _ in shares])
    return positions, np.concatenate([samples[: share.num_counted] for share, samples in shares])


class IndexedFeed:
    """Feed that looks up samples by position."""

    def __init__(
        self,
        rows: Rows,
        order: AnyOrder,
        plan: ShardPlan,
        to_tensors: ToTensors,
        augment: Augment,
        splits: int = 1,
    ) -> None:
        """splits: number of views of each sample, see `AugmentConfig`."""
        self._rows, self._order, self._plan = rows, order, plan
        self._to_tensors, self._augment, self._splits = to_tensors, augment, splits

    def from_position(self, position: int) -> Generator[Batch]:
        """Yield this rank's share of every global batch from `position` to the end of the run."""
        planned = (share for *_, shares in self._planned(position) for share in shares)
        with self._rows.open(self._request(*each) for each in planned) as take:
            for start, end, shares in self._planned(position):
                micro_batches = [self._micro_batch(take, *share, start, end) for share in shares]
                yield Batch(start, end, micro_batches, *_counted(shares))

    def shares(self, position: int) -> Iterator[Batch]:
        """Yield the same batches without micro-batches, so without reading data."""
        for start, end, shares in self._planned(position):
            yield Batch(start, end, [], *_counted(shares))

    def _request(self, share: MicroShare, samples: Int64s) -> Request:
        if self._splits == 1:
            return request(samples, share.positions)
        return request(np.repeat(samples, self._splits), view_positions(share.positions, self._splits))

    def _planned(self, position: int) -> Iterator[tuple[int, int, list[Share]]]:
        """Yield (start, end, shares of the micro-batches) for every global batch; samples are looked up in chunks."""
        chunk: list[tuple[int, int, list[MicroShare]]] = []
        num_rows = 0
        for start, end in self._plan.batch_ends(position):
            chunk.append((start, end, self._plan.micro_shares(start, end)))
            num_rows += sum(len(share.positions) for share in chunk[-1][2])
            if num_rows >= _PLAN_ROWS:
                yield from self._with_samples(chunk)
                chunk, num_rows = [], 0
        yield from self._with_samples(chunk)

    def _with_samples(self, chunk: list[tuple[int, int, list[MicroShare]]]) -> Iterator[tuple[int, int, list[Share]]]:
        if not chunk:
            return
        flat = self._order.samples(np.concatenate([share.positions for _, _, shares in chunk for share in shares]))
        used = 0
        for start, end, shares in chunk:
            looked_up = []
            for share in shares:
                looked_up.append((share, flat[used : used + len(share.positions)]))
                used += len(share.positions)
            yield start, end, looked_up

    def _micro_batch(self, take: Take, share: MicroShare, samples: Int64s, start: int, end: int) -> MicroBatch:
        taken, rows = take(np.repeat(samples, self._splits)), len(samples)
        images = self._to_tensors(taken.images, self._augment, np.repeat(share.positions, self._splits))
        # DDP averages gradients over ranks, so weights contain a factor of world_size
        weight = np.zeros(rows, np.float32)
        weight[: share.num_counted] = self._plan.world_size / (end - start)
        readable: npt.NDArray[np.bool_] | None = None
        if taken.readable is not None:
            readable = np.logical_and.reduce(taken.readable.reshape(rows, self._splits), axis=1)
        if readable is not None:
            weight *= readable
        labels, weights = self._to_tensors.targets(taken.labels[:: self._splits]), torch.from_numpy(weight)
        weights = weights.to(images.device, non_blocking=True)
        pairs = share.pairs(start, readable) if self._plan.in_pairs else None
        return MicroBatch(images, labels, weights, share.positions, pairs, share.num_partners)


def read(rows: Rows, batches: Sequence[Int64s]) -> Iterator[Taken]:
    """Yield the samples of each batch."""
    with rows.open(request(samples, samples) for samples in batches) as take:
        yield from map(take, batches)


def evaluation_batches(
    rows: Rows, to_tensors: ToTensors, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images, targets) of this rank's part of a split; over all ranks, each sample occurs exactly once.

    Samples that can't be read are excluded.
    """
    first, last = even_part(0, len(rows), rank, world_size)
    cuts = range(first, last, batch_size)
    for taken in read(rows, [np.arange(start, min(start + batch_size, last)) for start in cuts]):
        keep = slice(None) if taken.readable is None else taken.readable
        images = to_tensors(taken.images[keep])
        yield images, to_tensors.targets(taken.labels[keep])


def prefetched(batches: Iterator[T], depth: int, note_queue: Callable[[int], None] = lambda _: None) -> Generator[T]:
    """Yield items in order while a thread prepares up to `depth` of them. An item's error is raised in its place.

    note_queue: called with the number of ready items each time an item is requested.
    """
    if depth == 0:
        yield from batches
        return
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        pending = [pool.submit(next, batches, None) for _ in range(depth)]
        while True:
            note_queue(sum(future.done() for future in pending))
            if (item := pending.pop(0).result()) is None:
                return
            pending.append(pool.submit(next, batches, None))
            yield item
