"""Feeds as users would write them: torch's DataLoader, and a plain Ray Data pipeline. Same files, same decoding."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ftexp.data.cropping import Fit
from ftexp.data.decoder import Decoding
from ftexp.data.feeds.decoding import as_image

DECODING = Decoding("torchvision")  # that of ftexp's new runs
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Batches = Iterator[tuple[Tensor, Tensor]]


class Files(Dataset[tuple[Tensor, int]]):
    """A folder a class."""

    def __init__(self, paths: list[Path], image_size: int) -> None:
        classes = sorted({path.parent.name for path in paths})
        self.items = [(str(path), classes.index(path.parent.name)) for path in paths]
        self.image_size = image_size
        self.normalise = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.items[index]
        pixels = as_image(Path(path).read_bytes(), Fit(self.image_size, decoding=DECODING))
        return self.normalise(pixels.copy()), label  # torch warns of memory that it may not write to


def data_loader(paths: list[Path], image_size: int, batch_size: int, num_workers: int) -> Batches:
    """Epochs without end."""
    # forking a process in which Ray runs now and then crashes it, in gRPC
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        Files(paths, image_size),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=True,
        drop_last=True,
        multiprocessing_context=context,
    )
    while True:
        yield from loader


def ray_data(paths: list[Path], image_size: int, batch_size: int) -> Batches:
    """Epochs without end, shuffled by file and within a buffer."""
    classes = sorted({path.parent.name for path in paths})
    mean, std = (np.array(values, np.float32) for values in (MEAN, STD))

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        pixels = as_image(row["bytes"], Fit(image_size, decoding=DECODING)).astype(np.float32) / 255
        return {
            "image": ((pixels - mean) / std).transpose(2, 0, 1),
            "label": classes.index(Path(row["path"]).parent.name),
        }

    files = ray.data.read_binary_files([str(path) for path in paths], include_paths=True, shuffle="files")
    dataset = files.map(decode)
    while True:
        for batch in dataset.iter_torch_batches(
            batch_size=batch_size, local_shuffle_buffer_size=4 * batch_size, drop_last=True
        ):
            yield batch["image"], batch["label"]
