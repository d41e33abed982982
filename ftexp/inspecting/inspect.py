"""Facts of a data set: counts, pixels, bad samples, and a contact sheet of images as the model sees them.

Tasks that measure decoding import this module, so nothing at its top imports torch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import ray
from PIL import Image, ImageDraw, ImageFont

from ftexp.config.schema import SINGLE_LABEL, Config
from ftexp.data.cropping import Fit
from ftexp.data.decoder import Traits, UInt8s
from ftexp.data.feeds.decoding import PARTS, as_sample, decode_samples
from ftexp.data.info import SPLITS, BadSample, DataBundle, DataInfo, IndexedSplit
from ftexp.data.order import Int64s
from ftexp.data.sampling import run_order
from ftexp.data.targets import Labels, joined_label
from ftexp.errors import DataError

if TYPE_CHECKING:
    from ray.data import Dataset

    from ftexp.data.augment.picture import PictureAugment
    from ftexp.data.feeds.feed import Rows, Taken
    from ftexp.data.order import AnyOrder

MAX_READ = 20_000  # samples of train; also the limit of val and test together, which are read only for bad samples
SHOWN = 64  # samples of the contact sheet

_READ_BYTES = 32 * 2**20  # bytes of a batch while reading
_RATE_SECONDS, _RATE_SAMPLES = 2.0, 1024  # limits for one CPU when the decode rate is measured
_RATE_UNIT = 16  # samples between two readings of the clock

_COLUMNS, _GAP, _MARGIN = 8, 8, 16
_MIN_TILE, _MAX_TILE = 64, 256  # pixels
_PAPER, _INK, _FAINT, _EMPTY = "#ffffff", "#1a1a1a", "#6b6b6b", "#e4e4e4"


@dataclass
class Pixels:
    """Counts of each pixel value from 0 to 255, by channel: exact for any number of pixels."""

    counts: npt.NDArray[np.int64]  # [channels, 256]

    @classmethod
    def of(cls, channels: int) -> Pixels:
        """Return empty counts."""
        return cls(np.zeros((channels, 256), np.int64))

    def add(self, images: UInt8s) -> None:
        """Count a batch, [rows, height, width, channels]."""
        if len(images):
            # Pillow counts many times as fast as numpy, and sees the batch as one tall image
            tall = images.reshape(-1, *images.shape[2:])
            values = Image.fromarray(tall[..., 0] if tall.shape[2] == 1 else tall).histogram()
            self.counts += np.reshape(values, self.counts.shape)

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Return mean and std per channel, of pixels scaled to 0..1; the std is numpy's, the population's."""
        values, numbers = np.arange(256) / 255, self.counts.sum(axis=1)
        mean = self.counts @ values / numbers
        variance = np.array([counts @ (values - center) ** 2 for counts, center in zip(self.counts, mean, strict=True)])
        return mean.tolist(), np.sqrt(variance / numbers).tolist()


@dataclass
class Found:
    """Facts of a data set."""

    labels: dict[str, Labels]  # labels of each sample, by split
    pixels: Pixels  # pixels of the training samples that were read
    num_read: int  # number of training samples that were read, including bad ones
    others_read: bool  # whether bad samples of val and test are known
    bad: list[BadSample]
    images: UInt8s  # first positions of epoch 0 as the model sees them, in 0..255; [rows, size, size, channels]
    names: list[str | None]  # classes of `images`; None: a sample that can't be read
    traits: dict[Traits, int]  # number of images with each trait
    num_decoded: int  # number of images that were checked for traits, of all splits read
    rate: Rate | None  # None: nothing is decoded


@dataclass(frozen=True)
class Rate:
    """Rate at which tasks make training samples."""

    images_per_s: float
    parts_ms: dict[str, float]  # time of each part for one image on one CPU; see PARTS
    num_images: int  # number of measured images
    num_cpus: int


@dataclass
class _Counted:
    """Numbers of images by trait."""

    numbers: dict[Traits, int] = field(default_factory=lambda: dict.fromkeys(Traits, 0))
    num_images: int = 0

    def __call__(self, block: dict[str, Any]) -> None:
        traits = block["traits"]
        self.num_images += len(traits)
        for trait in self.numbers:
            self.numbers[trait] += int(np.count_nonzero(traits & trait))


@dataclass
class _Bad:
    """Bad samples, each once."""

    samples: dict[str, BadSample] = field(default_factory=dict)

    def __call__(self, samples: list[BadSample]) -> None:
        for sample in samples:
            self.samples.setdefault(sample.where, sample)


def look(config: Config, bundle: DataBundle, num_cpus: int) -> Found:
    """Read the data set; `config.data` must skip bad samples. DataError if no training sample can be read."""
    from ftexp.data.feeds.streamed import bundle_rows

    bad, counted = _Bad(), _Counted()
    bad(bundle.info.bad_samples)
    if not bundle.streamed and bundle.indexed:
        for dataset in bundle.datasets.values():
            _count_traits(dataset, counted)
    rows = bundle_rows(bundle, "train", num_cpus, bad, counted)
    order = run_order(config, len(rows), bundle.blocks, bundle.classes)
    each_once = _each_once(config)
    pixels, num_read, first = _read_train(rows, run_order(each_once, len(rows), bundle.blocks, None), bundle.info)
    if each_once != config:
        first = _joined(list(_taken(rows, order.samples(np.arange(min(len(rows), SHOWN))), bundle.info)))
    others_read = not bundle.streamed
    if bundle.streamed and sum(len(bundle.indexed[split]) for split in ("val", "test")) <= MAX_READ:
        others_read = True
        for split in ("val", "test"):
            others = bundle_rows(bundle, split, num_cpus, bad, counted)
            for _ in _taken(others, np.arange(len(others)), bundle.info):
                pass
    if not pixels.counts.any():
        one = next(iter(bad.samples.values()))
        raise DataError(f"none of {num_read:,} training samples can be read; the first: {one.where}: {one.reason}")
    names = [
        joined_label(label, bundle.info.class_names, ", ") if good else None
        for label, good in zip(first.labels, _good(first), strict=True)
    ]
    return Found(
        labels={split: _labels(bundle, split) for split in SPLITS},
        pixels=pixels,
        num_read=num_read,
        others_read=others_read,
        bad=list(bad.samples.values()),
        images=as_the_model_sees(config, bundle.info, _changed(config, bundle, order, first.images)),
        names=names,
        traits=counted.numbers,
        num_decoded=counted.num_images,
        rate=_rate(config, bundle, num_cpus),
    )


def _each_once(config: Config) -> Config:
    """Return the config, changed so that an epoch draws each sample once."""
    data = dataclasses.replace(config.data, sampling="shuffle")
    return dataclasses.replace(config, data=data, augment=dataclasses.replace(config.augment, repeats=1))


def _count_traits(dataset: Dataset, counted: _Counted) -> None:
    """Count the traits of a cached split."""
    if dataset.count():
        for block in dataset.select_columns(["traits"]).iter_batches(batch_size=None, batch_format="numpy"):
            counted(block)


def _read_train(rows: Rows, order: AnyOrder, info: DataInfo) -> tuple[Pixels, int, Taken]:
    """Return the pixels of the first samples of epoch 0, the number of samples read, and the first few samples."""
    pixels, num_read = Pixels.of(info.channels), min(len(rows), MAX_READ)
    first: list[Taken] = []
    for taken in _taken(rows, order.samples(np.arange(num_read)), info):
        pixels.add(taken.images[_good(taken)])
        if sum(len(batch.labels) for batch in first) < SHOWN:
            first.append(taken)
    return pixels, num_read, _joined(first)


def _joined(batches: Sequence[Taken]) -> Taken:
    """Return the first SHOWN samples of these batches."""
    from ftexp.data.feeds.feed import Taken

    parts = [(batch.images, batch.labels, _good(batch)) for batch in batches]
    return Taken(*(np.concatenate(column)[:SHOWN] for column in zip(*parts, strict=True)))


def _good(taken: Taken) -> npt.NDArray[np.bool_]:
    return np.ones(len(taken.labels), bool) if taken.readable is None else taken.readable


def _taken(rows: Rows, samples: Int64s, info: DataInfo) -> Iterator[Taken]:
    """Yield the rows of `samples`, in order and in batches."""
    from ftexp.data.feeds.feed import read

    size = max(1, min(256, _READ_BYTES // (info.image_size**2 * info.channels)))
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    yield from read(rows, batches)


def _labels(bundle: DataBundle, split: str) -> Labels:
    if bundle.streamed:
        return bundle.indexed[split].table.get()[1]
    rows = bundle.datasets[split].iterator()
    blocks = rows.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
    return np.concatenate([block["label"] for block in blocks] or [np.empty(0, np.int64)])


def _changed(config: Config, bundle: DataBundle, order: AnyOrder, images: UInt8s) -> UInt8s:
    """Return the samples at positions 0, 1, ... with the tasks' picture augmentation; `images` are without it."""
    from ftexp.data.augment.picture import PictureAugment

    if not config.augment.changes_pictures:
        return images
    splits = config.augment.splits
    positions = np.arange(len(images)) * splits + min(1, splits - 1)  # the view after the clean one
    augment = PictureAugment(config.augment, config.seed, bundle.info.fit, config.plugins)
    if split := bundle.indexed.get("train"):
        return decode_samples(split, order.samples(np.arange(len(images))), bundle.info.fit, augment, positions)[0]
    samples = (as_sample(image, bundle.info.fit) for image in images)
    pairs = zip(samples, positions.tolist(), strict=True)
    return np.stack([augment(sample.picture, position, sample.is_final) for sample, position in pairs])


def as_the_model_sees(config: Config, info: DataInfo, images: UInt8s) -> UInt8s:
    """Return the samples at positions 0, 1, ... augmented, normalised, erased and mixed as in training.

    They are converted back to pixels.
    """
    import torch

    from ftexp.data.augment.erasing import Erasing
    from ftexp.data.augment.mixing import Mixing
    from ftexp.data.augment.pixels import Augment
    from ftexp.data.batches import MicroBatch
    from ftexp.data.feeds.feed import ToTensors
    from ftexp.data.plan import MicroShare

    to_tensors = ToTensors(info, torch.device("cpu"), config.train.channels_last)
    augment, positions = config.augment, np.arange(len(images))
    seen = to_tensors(images, Augment(augment, config.seed, info.mean), positions)
    if augment.erase_prob:
        seen = Erasing(augment, config.seed, seen.device)(seen, positions)
    if augment.mixes:
        has_vectors, smoothing = info.task != SINGLE_LABEL, config.train.label_smoothing
        mixing = Mixing(augment, info.num_classes, smoothing, config.seed, has_vectors=has_vectors)
        for start in range(0, len(images), config.train.global_batch_size):
            own = positions[start : start + config.train.global_batch_size]
            rows = slice(start, start + len(own))
            # labels are dummies: mixed labels aren't shown
            none = torch.zeros(len(own), info.num_classes) if has_vectors else torch.zeros(len(own), dtype=torch.long)
            pairs = MicroShare(own, len(own)).pairs(start, None)
            seen[rows] = mixing(MicroBatch(seen[rows], none, none, own, pairs), start).images
    return to_tensors.pixels(seen)


def _rate(config: Config, bundle: DataBundle, num_cpus: int) -> Rate | None:
    """Measure making training samples on every CPU for some seconds; None for a source without decoding."""
    from ftexp.data.augment.picture import PictureAugment

    if not bundle.indexed:
        return None
    split, fit = bundle.indexed["train"], bundle.info.fit
    changes = config.augment.changes_pictures
    augment = PictureAugment(config.augment, config.seed, fit, config.plugins) if changes else None
    parts = [part[:_RATE_SAMPLES] for part in np.array_split(np.arange(len(split)), num_cpus) if len(part)]
    task = ray.remote(num_cpus=1)(_make_for)
    made = ray.get([task.remote(split, fit, augment, part) for part in parts])
    num_images = sum(len(costs) for costs, _ in made)
    spent_ms = np.concatenate([costs for costs, _ in made]).mean(axis=0).tolist() if num_images else []
    speed = sum(len(costs) / seconds for costs, seconds in made if len(costs))
    return Rate(speed, dict(zip(PARTS, spent_ms, strict=False)), num_images, len(parts))


def _make_for(
    split: IndexedSplit, fit: Fit, augment: PictureAugment | None, samples: Int64s
) -> tuple[npt.NDArray[np.float32], float]:
    """Make samples for at most some seconds; return each readable sample's time by part, and the seconds in total."""
    decode_samples(split, samples[:1], fit, augment, samples[:1])  # the first call also imports, and opens files
    costs, began = [], time.perf_counter()
    for some in np.split(samples, range(_RATE_UNIT, len(samples), _RATE_UNIT)):
        _, outcome = decode_samples(split, some, fit, augment, some)  # any positions will do
        costs.append(outcome.costs[[not reason for reason in outcome.reasons]])
        if time.perf_counter() - began > _RATE_SECONDS:
            break
    return np.concatenate(costs), time.perf_counter() - began


def contact_sheet(images: UInt8s, names: Sequence[str | None], title: str, subtitle: str) -> Image.Image:
    """Draw tiles with class names below them, in rows of eight. A name of None: the sample can't be read."""
    tile, scaled = _scaling(images.shape[1])
    font_size = min(18, max(12, tile // 10))
    font, title_font = ImageFont.load_default(font_size), ImageFont.load_default(font_size + 4)
    line = round(font_size * 1.4)
    top = _MARGIN + round(2.4 * line) + _GAP
    step_x, step_y = tile + _GAP, tile + line + _GAP
    width = 2 * _MARGIN + _COLUMNS * step_x - _GAP
    sheet = Image.new("RGB", (width, top + -(-len(images) // _COLUMNS) * step_y - _GAP + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN), _cut(title, room, title_font), _INK, title_font)
    draw.text((_MARGIN, _MARGIN + round(1.4 * line)), _cut(subtitle, room, font), _FAINT, font)
    for number, (pixels, name) in enumerate(zip(images, names, strict=True)):
        row, column = divmod(number, _COLUMNS)
        x, y = _MARGIN + column * step_x, top + row * step_y
        draw.rectangle((x - 1, y - 1, x + tile, y + tile), _EMPTY)  # its border stays visible, around white images
        if name is not None:
            sheet.paste(scaled(_picture(pixels)), (x, y))
        text = _cut("unreadable" if name is None else name, tile, font)
        draw.text((x + tile / 2, y + tile + 2), text, _FAINT if name is None else _INK, font, anchor="ma")
    return sheet


def _scaling(size: int) -> tuple[int, Callable[[Image.Image], Image.Image]]:
    """Return the size of a tile in pixels, and a function that scales a picture of `size` pixels to it.

    Tiny pictures are enlarged by repeating whole pixels.
    """
    tile = size * -(-_MIN_TILE // size)
    if tile > _MAX_TILE:
        return _MAX_TILE, lambda picture: picture.resize((_MAX_TILE, _MAX_TILE), Image.Resampling.LANCZOS)
    return tile, lambda picture: picture.resize((tile, tile), Image.Resampling.NEAREST)


def _picture(pixels: UInt8s) -> Image.Image:
    """Return an RGB picture of pixels with any number of channels, without a second or fourth one: Pillow's alpha."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] in (1, 2) else pixels[..., :3]).convert("RGB")


def _cut(text: str, room: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return as much of `text` as fits into `room` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…"
