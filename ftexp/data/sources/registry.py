"""Registry of data sources. On the driver, a source turns a `DataConfig` into a `DataBundle` of Ray Datasets, or into a
`Listing` of files that may be too many to decode at once.

Add a source with `@register_source("name")` in a module listed in `plugins`. It may read `config.kwargs`;
`bundle_from_arrays` does the rest for data that fit in memory. Ray must be running when a source is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftexp.config.schema import DataConfig
from ftexp.data.info import DataBundle
from ftexp.registry import Registry

if TYPE_CHECKING:
    from ftexp.data.listing import Listing

Source = Callable[[DataConfig], "DataBundle | Listing"]  # data in memory; or files, which ftexp.data.build reads

sources: Registry[Source] = Registry("data.name")
register_source = sources.register  # decorator that registers a function as data.name=<name>
