"""`python -m ftexp.train [group=option ...] [key=value ...]`: compose, check, run.

Nothing heavy is imported before the config is known to be good.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ftexp.checks import validate
from ftexp.cli import EXIT_INTERRUPTED, run_hydra, to_config
from ftexp.config import Config

if TYPE_CHECKING:
    from ftexp.storage import Storage
    from ftexp.tracking import RunState


def main() -> None:
    """Entry point of the command; exits with 0, 1, 2 or 130."""
    sys.exit(run_hydra(_task, sys.argv[1:]))


def _task(composed: DictConfig) -> float | None:
    from hydra.core.hydra_config import HydraConfig

    config = to_config(composed)
    overrides = list(HydraConfig.get().overrides.task)
    try:
        metrics = train(config, overrides)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    return metrics.get(config.checkpoint.checkpoint_score_attribute)


def train(config: Config, overrides: list[str] | None = None) -> dict[str, float]:
    """Check `config`, run it to the end and return its last metrics.

    Args:
        config: a whole run.
        overrides: what was typed, for overrides.yaml.

    Raises:
        ConfigError: the config is wrong; nothing was started.
        DataError: the data can't be read.
        RunFailedError: failures are spent. Everything saved is still there.
    """
    validate(config)
    return _run(config, overrides or [])


def _run(config: Config, overrides: list[str]) -> dict[str, float]:
    from ftexp.scaling import decide_workers, prepare_environment
    from ftexp.storage import Storage

    workers = decide_workers(config.scaling)
    run_name = config.run.name or time.strftime("%Y-%m-%d_%H-%M-%S")
    run_dir = Storage.at(config.run.storage, run_name)
    state = _open_run(config, run_dir, run_name)
    if state.status == "finished":
        from ftexp.terminal import Terminal

        Terminal().summary(state, run_dir)
        return state.metrics["last"]
    prepare_environment(config)
    from ftexp.session import run_session

    return run_session(config, overrides, workers, run_dir, state)


def _open_run(config: Config, run_dir: Storage, run_name: str) -> RunState:
    """The state to go on from; ConfigError if the directory holds a run that is defined otherwise."""
    from ftexp.fingerprint import differences, fingerprint
    from ftexp.tracking import RunState, read_state

    run_dir.require_writable()
    own = fingerprint(config)
    state = read_state(run_dir)
    if state is None:
        return RunState(name=run_name, fingerprint=own)
    differences(state.fingerprint, own, run_dir.uri)
    state.status = state.status if state.status == "finished" and state.epoch >= config.train.epochs else "running"
    return state


if __name__ == "__main__":
    main()
