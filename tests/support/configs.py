"""Configs composed as in the command."""

import hydra

from ftexp.cli.compose import to_config
from ftexp.config.schema import config_dir


def composed(*overrides):
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return to_config(hydra.compose("config", list(overrides)))
