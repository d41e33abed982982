"""Versions of the packages that affect a run's results."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version

_PACKAGES = ("ftexp", "ray", "torch", "torchvision", "timm", "numpy", "hydra-core")


@functools.cache
def package_versions() -> dict[str, str]:
    """Return {package: version}, including Python's."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
