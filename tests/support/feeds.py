"""A small feed over generated rows."""

import contextlib

import numpy as np
import torch

from ftexp.config.schema import AugmentConfig
from ftexp.data.augment.pixels import Augment
from ftexp.data.feeds.feed import CachedRows, IndexedFeed, Taken, ToTensors
from ftexp.data.info import DataInfo
from ftexp.data.order import SampleOrder, derive_seed

CPU = torch.device("cpu")


def mixing_seed(seed, position):
    """Return the seed of numpy's generator for mixing at `position`."""
    return derive_seed(derive_seed(seed, 0x6D6978), position) % 2**32


class Blocks:
    """Replaces a Ray DataIterator: `iter_batches` yields blocks given by the test."""

    def __init__(self, *blocks):
        self.blocks = blocks

    def iter_batches(self, **_):
        return iter(self.blocks)


def block(samples, size=4, channels=1):
    samples = np.asarray(samples)
    images = np.broadcast_to(samples[:, None, None, None], (len(samples), size, size, channels)).astype(np.uint8)
    return {"image": images, "label": samples * 10, "sample": samples}


class Unreadable:
    """`CachedRows` of which some can't be read."""

    def __init__(self, num_samples, unreadable):
        self._rows, self._unreadable = CachedRows(Blocks(block(np.arange(num_samples)))), list(unreadable)

    def __len__(self):
        return len(self._rows)

    def open(self, requests):
        return contextlib.nullcontext(self.take)

    def costs_ms(self):
        return {}

    def take(self, samples):
        taken, readable = self._rows.take(samples), ~np.isin(samples, self._unreadable)
        return Taken(taken.images * readable[:, None, None, None], taken.labels, None if readable.all() else readable)


def make_feed(num_samples, plan, channels=1, augment=None, rows=None):
    info = DataInfo(["a", "b"], 4, channels, [0.0] * channels, [1.0] * channels, {})
    return IndexedFeed(
        rows or CachedRows(Blocks(block(np.arange(num_samples), channels=channels))),
        SampleOrder(0, num_samples),
        plan,
        ToTensors(info, CPU, channels_last=False),
        Augment(augment or AugmentConfig(), seed=0),
    )
