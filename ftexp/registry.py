"""Registries: maps from names to builders. A config holds only names, so a config file can't run arbitrary code."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from ftexp.errors import ConfigError, UnknownNameError

T = TypeVar("T")
FROM_PLUGINS = "Your own are registered by a module listed in plugins=[...]."


def did_you_mean(name: str, available: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `available`, or an empty string."""
    close = difflib.get_close_matches(name, list(available), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


class Registry(Generic[T]):
    """Map from names to registered objects.

    `key` is the config key whose value is looked up here; messages name it.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument as `name`; ValueError if the name is taken."""

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.key}: '{name}' is already registered; choose another name")
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> T:
        """Return the entry called `name`; UnknownNameError suggests the closest match."""
        if name not in self._entries:
            raise UnknownNameError(
                f"{self.key}='{name}' is unknown.{did_you_mean(name, self._entries)} "
                f"Available: {', '.join(sorted(self._entries)) or 'none'}. {FROM_PLUGINS}"
            )
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def load_plugins(modules: Iterable[str]) -> None:
    """Import the user's modules, so that what they register can be named in the config.

    The working directory is on the import path, as it is for `python -m`.
    """
    if (cwd := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.append(cwd)
    for module in modules:
        if not all(module.split(".")):
            raise ConfigError(f"plugins=[{module}] is not a module name: write it as in an import: package.module")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"plugins=[{module}]: no module of that name can be imported. "
                "Run from the directory that contains it, or install it."
            ) from error
