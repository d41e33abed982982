"""Data sources."""

from ftexp.data.sources.arrays import bundle_from_arrays
from ftexp.data.sources.registry import sources

__all__ = ["bundle_from_arrays", "sources"]
