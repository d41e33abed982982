"""Differences between a run's config and the defaults."""

from __future__ import annotations

import functools
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton

from ftexp.cli.compose import to_config
from ftexp.config.masking import flat, masked
from ftexp.config.schema import config_dir

ABSENT = "—"


def config_differences(config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value, default) of every key whose value differs from the default."""
    own, usual = dict(flat(config, "")), _defaults()
    return [
        (key, own.get(key, ABSENT), usual.get(key, ABSENT))
        for key in dict.fromkeys([*usual, *own])
        if own.get(key, ABSENT) != usual.get(key, ABSENT)
    ]


@functools.cache
def _defaults() -> dict[str, Any]:
    state = Singleton.get_state()  # Hydra's state in the calling command, if it has one
    try:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return dict(flat(masked(to_config(compose("config"))), ""))
    finally:
        Singleton.set_state(state)
