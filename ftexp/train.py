"""`python -m ftexp.train [group=option ...] [key=value ...]`: compose, check, run.

Nothing slow is imported before the config has been validated.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ftexp.cli.compose import run_hydra, to_config
from ftexp.cli.entry import exiting_on_error, prepare_streams
from ftexp.cli.exit_codes import exit_code_of
from ftexp.cluster.process_exit import code_of
from ftexp.driver.restart import Restart, begin_again, begun_again
from ftexp.driver.run import train
from ftexp.sweep.hydra.plugins import with_plugins


def main() -> None:
    """Run the command; exit with 0, 1, 2, 75 or 130."""
    prepare_streams()
    if (restart := begun_again()) is not None:
        sys.exit(_again(restart))
    with exiting_on_error():
        words = with_plugins(sys.argv[1:])
    sys.exit(run_hydra(_task, words))


def _task(composed: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    # unresolved: ${oc.env:...} may be a secret, and may be missing
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    config = to_config(composed, overrides)
    alone = HydraConfig.get().mode == RunMode.RUN  # not one of several jobs: a restart would repeat all of them
    metrics = train(config, overrides, begin_again=begin_again if alone else None)
    return metrics.get(config.checkpoint.checkpoint_score_attribute)


def _again(restart: Restart) -> int:
    """Resume after the process has replaced itself because Ray died; return the exit code."""
    return exit_code_of(lambda: train(restart.config, restart.overrides, restart=restart, begin_again=begin_again))


if __name__ == "__main__":
    os._exit(code_of(main) & 0xFF)
