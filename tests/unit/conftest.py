"""What composes faster here than in the command."""

import pytest
from hydra._internal.hydra import Hydra


@pytest.fixture(autouse=True)
def _composing_once(monkeypatch):
    """Hydra composes all of a config for its `hydra.mode`, and again to run: here only where words give a mode."""
    get_mode = Hydra.get_mode

    def mode(self, config_name, overrides):
        is_given = any("hydra.mode" in word for word in overrides)
        return get_mode(self, config_name=config_name, overrides=overrides) if is_given else None

    monkeypatch.setattr(Hydra, "get_mode", mode)
