"""`python -m ftexp.train [group=option ...] [key=value ...]`: compose, check, run.

Nothing heavy is imported before the config is known to be good.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ftexp.checks import validate
from ftexp.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, run_hydra, to_config
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
    except KeyboardInterrupt as interrupt:
        sys.exit(EXIT_TERMINATED if type(interrupt).__name__ == "Terminated" else EXIT_INTERRUPTED)
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
    from ftexp.lease import Lease
    from ftexp.scaling import decide_workers, prepare_environment
    from ftexp.storage import Storage

    workers = decide_workers(config.scaling)
    run_name = config.run.name or time.strftime("%Y-%m-%d_%H-%M-%S")
    run_dir = Storage.at(config.run.storage, run_name)
    _require_resumable(config, run_dir)
    if config.resume_from is not None:
        config = dataclasses.replace(config, resume_from=_located(config.resume_from, run_dir))
    run_dir.require_writable()
    lease = Lease.take(run_dir)
    try:
        state = _open_run(config, run_dir, run_name)
        if state.status == "finished":
            from ftexp.terminal import Terminal

            Terminal().summary(state, run_dir)
            return state.metrics["last"]
        prepare_environment(config)
        from ftexp.session import run_session

        return run_session(config, overrides, workers, run_dir, state, lease)
    finally:
        lease.release()


def _has_run(run_dir: Storage) -> bool:
    from ftexp.checkpoint.store import CHECKPOINTS
    from ftexp.tracking import RUN_FILE

    return run_dir.exists(RUN_FILE) or bool(run_dir.child(CHECKPOINTS).list_folders())


def _located(uri: str, run_dir: Storage) -> str:
    """`resume_from` as workers in another folder can open it; ConfigError if a new run finds no checkpoint there."""
    from ftexp.checkpoint.store import locate
    from ftexp.errors import CheckpointError, ConfigError
    from ftexp.storage import Storage

    try:
        if not _has_run(run_dir):  # a run that has begun has checkpoints of its own
            locate(uri)
    except CheckpointError as error:
        raise ConfigError(f"resume_from={uri}: {error}") from error
    return Storage.at(uri).uri


def _require_resumable(config: Config, run_dir: Storage) -> None:
    """ConfigError if `resume` says that there must, or mustn't, be a run already."""
    from ftexp.errors import ConfigError

    if config.resume == "auto":
        return
    has_run = _has_run(run_dir)
    if config.resume == "must" and not has_run:
        raise ConfigError(
            f"resume=must, but {run_dir.uri} holds no run: see run.name and run.storage, or take resume=auto"
        )
    if config.resume == "never" and has_run:
        raise ConfigError(
            f"resume=never, but {run_dir.uri} holds a run: choose another run.name, or go on with it by resume=auto"
        )


def _open_run(config: Config, run_dir: Storage, run_name: str) -> RunState:
    """The state to go on from; ConfigError if the directory holds a run that is defined otherwise."""
    from ftexp.checkpoint.store import CHECKPOINTS, CheckpointStore
    from ftexp.fingerprint import differences, fingerprint
    from ftexp.ledger import last_attempt
    from ftexp.tracking import RunState, read_state

    own = fingerprint(config)
    state = read_state(run_dir)
    if state is None:  # run.json may be lost: the checkpoints still tell what they are
        manifests = CheckpointStore(run_dir.child(CHECKPOINTS)).manifests(lambda *_: None)
        for manifest in manifests[:1]:
            differences(manifest.fingerprint, own, run_dir.uri)
        attempts = max([last_attempt(run_dir), *(manifest.attempt for manifest in manifests)])
        return RunState(name=run_name, fingerprint=own, attempts=attempts)
    differences(state.fingerprint, own, run_dir.uri)
    train = config.train
    done = state.epoch >= train.epochs or (train.max_steps is not None and state.step >= train.max_steps)
    state.status = state.status if state.status == "finished" and done else "running"
    return state


if __name__ == "__main__":
    main()
