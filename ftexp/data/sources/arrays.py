"""Sources that hold all data in memory, and the building of a `DataBundle` from arrays."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftexp.config.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL, DataConfig
from ftexp.data.decoder import UInt8s as UInt8s
from ftexp.data.info import SPLITS, DataBundle, DataInfo
from ftexp.data.labels import class_warnings
from ftexp.data.sources.registry import register_source
from ftexp.data.stratify import stratified_split
from ftexp.data.targets import Labels, packed, target_facts
from ftexp.errors import DataError

if TYPE_CHECKING:
    pass

BLOCK_BYTES = 64 * 2**20  # Ray Data recommends blocks of 1 to 128 MiB


def bundle_from_arrays(
    config: DataConfig,
    images: UInt8s,
    labels: Labels,
    class_names: list[str],
    test: tuple[UInt8s, Labels] | None = None,
) -> DataBundle:
    """Split arrays and store them in Ray's object store.

    Args:
        config: provides the split fractions and the fields that `DataInfo` copies.
        images: uint8 [num_samples, image_size, image_size, channels].
        labels: [num_samples], in [0, len(class_names)). With data.task=multi_label 0 or 1 for each class, and with
            data.task=regression numbers, each [num_samples, len(class_names)].
        class_names: in the order of the labels; in a regression, the names of the targets.
        test: images and labels of the source's own test split; None: split off by `config.test_fraction`.
    """
    expected = (config.image_size, config.image_size, config.channels)
    for pixels, numbers in ((images, labels), *([test] if test is not None else [])):
        if pixels.shape[1:] != expected:
            raise DataError(
                f"data.name={config.name} has images of shape {pixels.shape[1:]}, but data.image_size and "
                f"data.channels say {expected}"
            )
        _require_sound(config, pixels, numbers, len(class_names))
    labels = _as_stored(config, labels)
    fractions = (config.val_fraction, 0.0 if test is not None else config.test_fraction)
    parts = stratified_split(labels, fractions, config.split_seed)
    arrays = {name: (images[part], labels[part]) for name, part in zip(SPLITS, parts, strict=True)}
    if test is not None:
        arrays["test"] = (test[0], _as_stored(config, test[1]))
    return DataBundle(
        datasets={name: _dataset(*pair) for name, pair in arrays.items()},
        info=make_info(
            config,
            class_names,
            {name: len(pair[1]) for name, pair in arrays.items()},
            warnings=class_warnings(class_names, {name: labels for name, (_, labels) in arrays.items()}),
            **target_facts(config, arrays["train"][1]),
        ),
    )


def make_info(config: DataConfig, class_names: list[str], num_samples: dict[str, int], **extra: Any) -> DataInfo:
    """Build the `DataInfo` of a source; DataError if `data.num_classes` is smaller than the number of classes found."""
    if config.num_classes is not None and config.num_classes < len(class_names):
        raise DataError(
            f"data.num_classes={config.num_classes}, but data.name={config.name} has {len(class_names)} classes: "
            "remove it, or set at least as many"
        )
    num_classes = (config.num_classes or 0) if config.task != REGRESSION else 0
    spare = [f"class_{number}" for number in range(len(class_names), num_classes)]
    return DataInfo(
        class_names=class_names + spare,
        image_size=config.image_size,
        channels=config.channels,
        mean=list(config.mean),
        std=list(config.std),
        num_samples=num_samples,
        integer_labels=config.integer_labels,
        task=config.task,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
        interpolation=config.interpolation,
        decoder=config.decoder_name,
        decode_size=config.decode_size,
        exif_orientation=config.exif_orientation,
        background=config.background,
        bit_depth=config.bit_depth,
        **{"excluded": [], **extra},
    )


def _as_stored(config: DataConfig, labels: Labels) -> Labels:
    """Convert labels to the task's format of `Labels`."""
    if config.task == MULTI_LABEL:
        rows, classes = np.nonzero(labels)
        return packed(rows, classes, len(labels), max(labels.shape[1], config.num_classes or 0))
    return labels.astype(np.float32 if config.task == REGRESSION else np.int64, copy=False)


def _require_sound(config: DataConfig, images: UInt8s, labels: Labels, num_classes: int) -> None:
    """Raise DataError for invalid arrays from a custom source; training would fail later, or not at all."""
    name = config.name
    if images.dtype != np.uint8:
        raise DataError(f"data.name={name} has images of type {images.dtype}: give pixels from 0 to 255 as uint8")
    if config.task != SINGLE_LABEL:
        if labels.shape != (len(images), num_classes):
            raise DataError(
                f"data.name={name} has labels of shape {labels.shape}: data.task={config.task} takes a row for each of "
                f"{len(images)} images and a column for each of {num_classes} names"
            )
        if config.task == MULTI_LABEL and not np.isin(labels, (0, 1)).all():
            raise DataError(f"data.name={name} has labels other than 0 and 1, which data.task=multi_label takes")
        if config.task == REGRESSION and not np.isfinite(labels).all():
            raise DataError(f"data.name={name} has targets that are NaN or infinite")
        return
    if labels.shape != (len(images),):
        raise DataError(
            f"data.name={name} has {len(images)} images, but labels of shape {labels.shape}: give one per image"
        )
    if labels.dtype.kind not in "iub":
        raise DataError(f"data.name={name} has labels of type {labels.dtype}: give numbers of classes, as int64")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise DataError(
            f"data.name={name} has labels from {labels.min()} to {labels.max()}, but {num_classes} class names: "
            f"labels are numbers from 0 to {num_classes - 1}"
        )


def _dataset(images: UInt8s, labels: Labels) -> Any:
    import pyarrow as pa
    import ray.data

    rows = max(1, BLOCK_BYTES // max(1, images[0].nbytes if len(images) else 1))
    tables = [
        pa.table(
            {
                "image": pa.FixedShapeTensorArray.from_numpy_ndarray(
                    np.ascontiguousarray(images[start : start + rows])
                ),
                "label": _column(labels[start : start + rows]),
                "sample": np.arange(start, min(start + rows, len(images))),
            }
        )
        for start in range(0, len(images), rows)
    ]
    return ray.data.from_arrow(tables) if tables else ray.data.from_items([])


def _column(labels: Labels) -> Any:
    """Return labels as a column that Ray Data reads as an array of the same shape."""
    import pyarrow as pa

    return labels if labels.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(labels))


@register_source("digits")
def digits(config: DataConfig) -> DataBundle:
    """Load scikit-learn's digits: 1,797 grey images of 8x8 pixels with 17 grey levels, scaled to `image_size`."""
    from PIL import Image

    rows = np.loadtxt(_digits_file(), delimiter=",")
    images, labels = rows[:, :-1], rows[:, -1]
    pixels = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    size = (config.image_size, config.image_size)
    if size != (8, 8):
        small = (Image.fromarray(image[..., 0]) for image in pixels)
        pixels = np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC))[..., None] for image in small])
    return bundle_from_arrays(config, pixels, labels.astype(np.int64), [str(digit) for digit in range(10)])


def _digits_file() -> Path:
    """Return the file that sklearn.datasets.load_digits reads; importing scikit-learn would take a second."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("data.name=digits comes with scikit-learn, which isn't installed: pip install scikit-learn")
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


@register_source("cifar10")
def cifar10(config: DataConfig) -> DataBundle:
    """Load CIFAR-10 in torchvision's layout: 50,000 + 10,000 colour images of 32x32 pixels."""
    from torchvision.datasets import CIFAR10

    return _cifar(config, CIFAR10)


@register_source("cifar100")
def cifar100(config: DataConfig) -> DataBundle:
    """Load CIFAR-100 in torchvision's layout: 50,000 + 10,000 colour images of 32x32 pixels, 100 classes."""
    from torchvision.datasets import CIFAR100

    return _cifar(config, CIFAR100)


def _cifar(config: DataConfig, dataset_class: Any) -> DataBundle:
    assert config.root is not None, "checked by ftexp.config.checks.validate"
    root = Path(config.root).expanduser()
    try:
        train = dataset_class(root, train=True, download=config.download)
        test = dataset_class(root, train=False, download=config.download)
    except (RuntimeError, OSError) as error:  # files missing or corrupt; URLError is an OSError
        hint = "check the network" if config.download else "set data.download=true, or point data.root at them"
        raise DataError(
            f"data.name={config.name}: no usable files of torchvision's layout under data.root={root} ({error}); {hint}"
        ) from error
    arrays = (np.asarray(test.data, np.uint8), np.asarray(test.targets, np.int64))
    return bundle_from_arrays(
        config, np.asarray(train.data, np.uint8), np.asarray(train.targets, np.int64), list(train.classes), arrays
    )
