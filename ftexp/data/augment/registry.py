"""Names of the user's own augmentations. Imports neither numpy nor Pillow: the driver knows them by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ftexp.registry import Registry

if TYPE_CHECKING:
    from ftexp.data.decoder import UInt8s

# (pixels uint8 [size, size, channels], draws) -> pixels of the same shape and type. All that is random must come from
# `draws`, which is seeded by the position that the picture is for: so it is the same after a restart, on any worker.
Augmentation = Callable[["UInt8s", random.Random], "UInt8s"]
_augmentations: Registry[Augmentation] = Registry("augment.custom")


def register_augmentation(name: str) -> Callable[[Augmentation], Augmentation]:
    """Decorate a function: make it available to `augment.custom`, which changes single training pictures."""
    return _augmentations.register(name)


def augmentations(names: Iterable[str]) -> list[Augmentation]:
    """Return what is registered under `names`; UnknownNameError if something isn't."""
    return [_augmentations.get(name) for name in names]
