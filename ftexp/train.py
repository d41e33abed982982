"""`python -m ftexp.train [group=option ...] [key=value ...]`: compose, check, run.

Nothing heavy is imported before the config is known to be good.
"""

from __future__ import annotations

import os
import sys

from omegaconf import DictConfig

from ftexp.cli import interrupted_code, prepare_streams, print_error, run_hydra, to_config
from ftexp.ending import code_of
from ftexp.errors import ConfigError
from ftexp.running import train
from ftexp.sweep.plugins import with_plugins


def main() -> None:
    """Entry point of the command; exits with 0, 1, 2, 75 or 130."""
    prepare_streams()
    try:
        words = with_plugins(sys.argv[1:])
    except ConfigError as error:
        print_error(error)
        sys.exit(error.exit_code)
    sys.exit(run_hydra(_task, words))


def _task(composed: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    config = to_config(composed, overrides)
    try:
        metrics = train(config, overrides)
    except KeyboardInterrupt as interrupt:
        sys.exit(interrupted_code(interrupt))
    return metrics.get(config.checkpoint.checkpoint_score_attribute)


if __name__ == "__main__":
    os._exit(code_of(main) & 0xFF)
