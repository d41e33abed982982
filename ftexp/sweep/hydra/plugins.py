"""Registration of ftexp's launcher and sweeper with Hydra.

Hydra accepts plug-ins only from the package hydra_plugins. These classes claim to come from there, so nothing has to be
installed in addition to ftexp.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.plugin import Plugin

from ftexp.config.schema import SearchConfig
from ftexp.errors import ConfigError
from ftexp.sweep.hydra.launcher import PLUGINS, SweepLauncher
from ftexp.sweep.hydra.sweeper import TuneSweeper

LAUNCHER = "ftexp"
_SWEEPER = "hydra/sweeper=tune"


@dataclass(kw_only=True)
class _SweeperNode(SearchConfig):
    _target_: str = f"{PLUGINS}.{TuneSweeper.__name__}"


def with_plugins(words: Sequence[str]) -> list[str]:
    """Return the command's words; for a multirun, add ftexp's launcher unless they name another.

    For a multirun, also registers the plug-ins with Hydra.

    ConfigError for a search that isn't a multirun or names a launcher.
    """
    names_launcher = any(word.startswith("hydra/launcher=") for word in words)
    if not any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words):
        if _SWEEPER in words:
            raise ConfigError(f"{_SWEEPER} needs a sweep: add -m")
        return list(words)
    if _SWEEPER in words and names_launcher:
        raise ConfigError(f"{_SWEEPER} starts its trials itself: remove hydra/launcher=...")
    _register()
    return list(words) if names_launcher else [*words, f"hydra/launcher={LAUNCHER}"]


def _register() -> None:
    plugins = Plugins.instance()  # scans the installed plug-ins, so this comes before any registration
    package_name, _, module = PLUGINS.partition(".")
    try:
        package = importlib.import_module(package_name)
    except ModuleNotFoundError:  # no plug-in is installed
        package = sys.modules[package_name] = types.ModuleType(package_name)
        package.__path__ = []  # Hydra scans it if it is initialised again in this process, as by its compose API
    classes: tuple[type[Plugin], ...] = (SweepLauncher, TuneSweeper)
    setattr(package, module, types.SimpleNamespace(**{each.__name__: each for each in classes}))
    for each in classes:
        plugins.register(each)
    store = ConfigStore.instance()
    launcher = {"_target_": f"{PLUGINS}.{SweepLauncher.__name__}"}
    store.store(group="hydra/launcher", name=LAUNCHER, node=launcher, provider="ftexp")
    store.store(group="hydra/sweeper", name="tune_schema", node=_SweeperNode, provider="ftexp")
