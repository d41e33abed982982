"""Registry of data sources. A source turns `DataConfig` into a `DataBundle` of Ray Datasets, on the driver,
or into a `Listing` of files that are too many to decode at once.

Add one with `@register_source("name")` in a module named under `plugins`; it may read `config.kwargs`, and
`bundle_from_arrays` does the rest for data that fits in memory. Ray must be running when one is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftexp.config.schema import DataConfig
from ftexp.data.info import DataBundle
from ftexp.registry import Registry

if TYPE_CHECKING:
    from ftexp.data.listing import Listing

Source = Callable[[DataConfig], "DataBundle | Listing"]  # all in memory; or files, which ftexp.data.build reads

sources: Registry[Source] = Registry("data.name")
register_source = sources.register  # decorates a function, which data.name then finds by the given name
