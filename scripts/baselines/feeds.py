"""Feeds as users would write them: three variants of torch's DataLoader, and a plain Ray Data pipeline.

Each applies a random resized crop and a flip, and yields normalised batches, epoch after epoch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.data
import torch
from PIL import Image, ImageOps
from ray.data.datasource import Partitioning
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Batches = Iterator[tuple[Tensor, Tensor]]


def pillow_transform(image_size: int) -> Callable[[Any], Tensor]:
    """Return the training transform of pytorch/examples/imagenet/main.py."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def data_loader(root: Path, image_size: int, batch_size: int, num_workers: int, times: int) -> Batches:
    """Load an ImageFolder with torchvision's transforms of Pillow images; an epoch has every file `times` times."""
    return loaded(ImageFolder(root, pillow_transform(image_size)), batch_size, num_workers, times)


def timm_loader(
    root: Path, image_size: int, batch_size: int, num_workers: int, times: int, auto_augment: str
) -> Batches:
    """Load an ImageFolder with timm's transform."""
    transform = create_transform(
        image_size, is_training=True, color_jitter=None, auto_augment=auto_augment, interpolation="bicubic"
    )
    return loaded(ImageFolder(root, transform), batch_size, num_workers, times, as_older_pillow)


def as_older_pillow(_: int) -> None:
    """Make posterize return a black image for 0 bits, which timm may draw: older Pillow did, newer raises an error."""
    posterize = ImageOps.posterize
    ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else Image.new(image.mode, image.size)


def fast_loader(root: Path, image_size: int, batch_size: int, num_workers: int, times: int) -> Batches:
    """Load with torchvision's decoder and its transforms of uint8 tensors; normalise whole batches."""
    transform = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    for images, labels in loaded(ImageFolder(root, transform, loader=decoded), batch_size, num_workers, times):
        yield images.float().sub_(mean).div_(std), labels


def decoded(path: str) -> Tensor:
    return decode_jpeg(read_file(path), ImageReadMode.RGB)


def loaded(
    dataset: ImageFolder,
    batch_size: int,
    num_workers: int,
    times: int,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Batches:
    # a fork of a process in which Ray runs occasionally crashes, in gRPC
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    loader = DataLoader(
        ConcatDataset([dataset] * times),
        batch_size,
        shuffle=True,
        num_workers=num_workers,
        persistent_workers=True,
        drop_last=True,
        worker_init_fn=worker_init_fn,
        multiprocessing_context=context,
    )
    while True:
        yield from loader


def ray_data(root: Path, image_size: int, batch_size: int, times: int) -> Batches:
    """Read images as Ray's guides do for training: shuffled by file and within a buffer, transformed row by row."""
    classes = {directory.name: number for number, directory in enumerate(sorted(root.iterdir()))}
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(image_size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def transformed(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": transform(row["image"]), "label": classes[row["class"]]}

    dataset = ray.data.read_images(
        [str(root)] * times,
        mode="RGB",
        partitioning=Partitioning("dir", field_names=["class"], base_dir=str(root)),
        shuffle="files",
    ).map(transformed)
    while True:
        for batch in dataset.iter_torch_batches(
            batch_size=batch_size, local_shuffle_buffer_size=4 * batch_size, drop_last=True
        ):
            yield batch["image"], batch["label"]
