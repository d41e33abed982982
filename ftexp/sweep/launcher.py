"""The Hydra launcher behind `python -m ftexp.train -m ...`: checks every trial, then hands them to the sweep.

Why not hydra-ray-launcher (1.2.2): it gives every job one and the same resource spec, runs a job as a Ray task
that knows nothing of the workers that its trainer will ask for, returns when the whole batch has, numbers jobs anew in
every call and keeps no record of them, so that nothing can be gone on with. It also wants boto3, ray[default] and
cloudpickle < 3. What it does do, handing composed configs to processes, is a small part of what is here.
hydra-optuna-sweeper (1.3.0) is no help for a search either: it wants optuna < 3, which is at 5.

Hydra takes plug-ins from the package hydra_plugins alone. This class says that it is from there, so that nothing has
to be installed beside ftexp.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from ftexp.checks import validate
from ftexp.cli import to_config
from ftexp.config import Config
from ftexp.errors import ConfigError
from ftexp.sweep.identity import parse_words

LAUNCHER = "ftexp"
_OF_THE_SWEEP = ("sweep", "verbose", "plugins")  # one Ray, one command: the same for all trials
_PLUGINS = "hydra_plugins"


def is_multirun(words: Sequence[str]) -> bool:
    """Whether the command is a multirun whose launcher the user leaves to ftexp."""
    return any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words) and not any(
        word.startswith("hydra/launcher=") for word in words
    )


def register_launcher() -> None:
    """Make `hydra/launcher=ftexp` known, and the module that the class says it is from."""
    plugins = Plugins.instance()  # looks through what is installed, so before anything is added
    try:
        package = importlib.import_module(_PLUGINS)
    except ModuleNotFoundError:  # no plug-in is installed
        package = sys.modules[_PLUGINS] = types.ModuleType(_PLUGINS)
    setattr(package, LAUNCHER, types.SimpleNamespace(SweepLauncher=SweepLauncher))
    plugins.register(SweepLauncher)
    node = {"_target_": f"{SweepLauncher.__module__}.{SweepLauncher.__name__}"}
    ConfigStore.instance().store(group="hydra/launcher", name=LAUNCHER, node=node, provider="ftexp")


class SweepLauncher(Launcher):
    """Runs a batch of jobs as the trials of one sweep."""

    __module__ = f"{_PLUGINS}.{LAUNCHER}"

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composing takes; the task of a job is ftexp's own training, in another process."""
        del task_function
        self._context, self._config = hydra_context, config
        if config.hydra.sweeper.get("max_batch_size"):
            raise ConfigError("hydra.sweeper.max_batch_size: trials don't wait for batches; use sweep.max_concurrent")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; SweepFailedError if any of them failed.

        Raises:
            ConfigError: a job's config is wrong, or differs from what the sweep began with; nothing was started.
        """
        del initial_job_idx  # a trial is never its number
        composed = [self._compose(words) for words in job_overrides]
        configs = _checked(composed)
        jobs = [parse_words(words, config) for words, config in zip(job_overrides, composed, strict=True)]
        from ftexp.sweep.sweep import run_sweep

        values = run_sweep(configs, jobs, [list(words) for words in job_overrides])
        return [_returned(value) for value in values]

    def _compose(self, words: Sequence[str]) -> DictConfig:
        composed = self._context.config_loader.load_sweep_config(self._config, list(words))
        with open_dict(composed):
            del composed["hydra"]
        return composed


def _checked(composed: Sequence[DictConfig]) -> list[Config]:
    """The typed configs; ConfigError with every mistake of every trial, each once."""
    configs: list[Config] = []
    problems: dict[str, None] = {}
    for each in composed:
        try:
            config = to_config(each)
            validate(config)
            configs.append(config)
        except ConfigError as error:
            problems |= dict.fromkeys(str(error).splitlines())
    problems |= dict.fromkeys(_sweep_problems(configs))
    if problems:
        raise ConfigError("\n".join(problems))
    return configs


def _sweep_problems(configs: Sequence[Config]) -> list[str]:
    problems = []
    if any(config.run.name is not None for config in configs):
        problems.append("run.name: a sweep names its trials by what differs between them; use sweep.name")
    settings: dict[str, list[Any]] = {key: [getattr(config, key) for config in configs] for key in _OF_THE_SWEEP}
    settings |= {"run.storage": [config.run.storage for config in configs]}
    settings |= {"scaling.address": [config.scaling.address for config in configs]}
    for key, values in settings.items():
        if any(value != values[0] for value in values):
            problems.append(f"{key} can't differ between the trials of a sweep: give one value")
    return problems


def _returned(value: float | None) -> JobReturn:
    job = JobReturn()
    job.return_value, job.status = value, JobStatus.COMPLETED
    return job
