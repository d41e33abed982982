"""Checks of progressive resizing."""

from __future__ import annotations

from collections.abc import Iterator

from ftexp.config.checks.wording import unused
from ftexp.config.schema import Config

_RAMP = ("delay_fraction", "finetune_fraction", "size_increment")


def check_resizing(config: Config) -> Iterator[str]:
    """Check the first image size and its growth."""
    resizing, size = config.resizing, config.data.image_size
    if resizing.initial_scale is None:
        yield from unused(resizing, "resizing", _RAMP, "needs resizing.initial_scale")
        return
    if resizing.delay_fraction + resizing.finetune_fraction > 1:
        yield (
            f"resizing.delay_fraction={resizing.delay_fraction} and resizing.finetune_fraction="
            f"{resizing.finetune_fraction} add up to more than 1: lower one of them"
        )
    if resizing.size_increment > size * resizing.initial_scale:
        yield (
            f"resizing.size_increment={resizing.size_increment} is larger than the first images, of data.image_size="
            f"{size} times resizing.initial_scale={resizing.initial_scale}: lower it"
        )
