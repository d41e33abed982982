"""Checks of the data source and of the images' shape and decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ftexp.config.checks.wording import unregistered
from ftexp.config.schema import Config
from ftexp.config.source_names import SOURCE_FIELDS, can_stream
from ftexp.counting import counted

_SOURCE_ONLY = frozenset(name for names in SOURCE_FIELDS.values() for name in names) | {"kwargs"}


def check_data(config: Config) -> Iterator[str]:
    """Check the source, its fields and its normalisation."""
    data = config.data
    if data.name not in SOURCE_FIELDS:
        if not config.plugins:
            yield unregistered("data.name", data.name, sorted(SOURCE_FIELDS))
    else:
        used = SOURCE_FIELDS[data.name]
        defaults = {field.name: field for field in dataclasses.fields(data)}
        # images of a source in memory aren't decoded, but tasks may augment them
        free = {"decode_cpus"} if config.augment.changes_pictures else set()
        for name in sorted(_SOURCE_ONLY - set(used) - free):
            field, value = defaults[name], getattr(data, name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default:
                yield f"data.{name}={value} is not used by data.name={data.name}: remove it"
        if data.feed == "streaming" and not can_stream(data.name):
            yield f"data.feed=streaming: data.name={data.name} is held in memory; set data.feed=cached"
        if "root" in used and data.root is None:
            yield f"data.root is not set: data.name={data.name} reads files; set data.root to their directory or URI"
    yield from _decoding_problems(config)
    for name in ("mean", "std"):
        values = getattr(data, name)
        if len(values) != data.channels:
            found = counted(len(values), "value")
            yield f"data.{name}={values} has {found}, but data.channels={data.channels}: give one per channel"
    if not all(math.isfinite(value) for value in data.mean):
        yield f"data.mean={data.mean} must be finite numbers"
    if not all(0 < value < math.inf for value in data.std):
        yield f"data.std={data.std} must be finite numbers above 0"
    if data.val_fraction + data.test_fraction >= 1:
        yield (
            f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave nothing to "
            "train on: their sum must be below 1"
        )
    if data.sampling != "shuffle" and data.shuffle_window is not None:
        yield (
            f"data.sampling={data.sampling} draws single samples, and data.shuffle_window={data.shuffle_window} reads "
            "whole blocks: set data.sampling=shuffle, or data.shuffle_window=null (parquet: with data.feed=cached)"
        )
    if config.augment.pad_px >= data.image_size:
        yield f"augment.pad_px={config.augment.pad_px} must be below data.image_size={data.image_size}"


def _decoding_problems(config: Config) -> Iterator[str]:
    data = config.data
    if data.decode_size is not None and config.augment.crop == "none":
        yield f"data.decode_size={data.decode_size} is used only with augment.crop: remove it, or set augment.crop"
    if data.decode_size is not None and data.decode_size < data.image_size:
        yield (
            f"data.decode_size={data.decode_size} must be at least data.image_size={data.image_size}: otherwise "
            "images are enlarged"
        )
    if data.background is not None and data.background != "white" and not _is_colour(data.background):
        yield f"data.background={data.background} is not a colour: give a name such as white, #rrggbb, or null"


def _is_colour(text: str) -> bool:
    from PIL import ImageColor  # accepts #rrggbb and the names that Pillow knows

    try:
        return len(ImageColor.getrgb(text)) == 3
    except ValueError:
        return False
