"""Registry of the user's own augmentations. Imports neither numpy nor Pillow: the driver uses only the names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ftexp.registry import Registry

if TYPE_CHECKING:
    from ftexp.data.decoder import UInt8s

# (pixels uint8 [size, size, channels], draws) -> pixels of the same shape and type. All random numbers must come from
# `draws`, which is seeded by the picture's position: so they are the same after a restart and on any worker.
Augmentation = Callable[["UInt8s", random.Random], "UInt8s"]
_augmentations: Registry[Augmentation] = Registry("augment.custom")


def register_augmentation(name: str) -> Callable[[Augmentation], Augmentation]:
    """Decorate a function: register it for `augment.custom`, which applies it to single training pictures."""
    return _augmentations.register(name)


def augmentations(names: Iterable[str]) -> list[Augmentation]:
    """Return the augmentations registered under `names`; UnknownNameError if a name isn't registered."""
    return [_augmentations.get(name) for name in names]
