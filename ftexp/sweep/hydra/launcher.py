"""The Hydra launcher behind `python -m ftexp.train -m ...`: checks every trial, then passes them to the sweep.

Why not hydra-ray-launcher (1.2.2): it gives every job the same resource spec, and runs a job as a Ray task that knows
nothing of the workers that its trainer will request. It returns only when the whole batch has ended. It renumbers jobs
in every invocation and keeps no record of them, so nothing can be resumed. It also needs boto3, ray[default] and
cloudpickle < 3. Its actual task, passing composed configs to processes, is a small part of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from ftexp.cli.compose import past_composing, remove_note, to_config
from ftexp.config.checks.validate import validate
from ftexp.config.schema import Config
from ftexp.errors import ConfigError
from ftexp.sweep.run.identity import parse_words

PLUGINS = "hydra_plugins.ftexp"  # module that Hydra takes for the plug-ins' origin: see ftexp.sweep.hydra.plugins
_OF_THE_SWEEP = ("sweep", "verbose", "plugins", "tracker")  # one of each in a sweep: the same for all trials


class SweepLauncher(Launcher):
    """Launcher that runs a batch of jobs as the trials of one sweep."""

    __module__ = PLUGINS

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the arguments of `compose`; a job's task is always ftexp's training, in another process."""
        del task_function
        self._context, self._config = hydra_context, config
        if config.hydra.sweeper.get("max_batch_size"):
            raise ConfigError(
                "hydra.sweeper.max_batch_size: trials do not run in batches; set sweep.max_concurrent instead"
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; SweepFailedError if any of them failed.

        Raises:
            ConfigError: a job's config is wrong, or differs from the sweep's earlier config; nothing was started.
        """
        del initial_job_idx  # trials are known by name, not by number
        remove_note(self._config.hydra.sweep.dir)
        composed = [compose(self._context, self._config, words) for words in job_overrides]
        configs = checked(composed, job_overrides)
        jobs = [parse_words(words, config) for words, config in zip(job_overrides, composed, strict=True)]
        from ftexp.sweep.run.grid import run_grid  # late, since it imports NumPy, and every command imports this module

        with past_composing():
            values = run_grid(configs, jobs, [list(words) for words in job_overrides])
        return [_returned(value) for value in values]


def compose(context: HydraContext, config: DictConfig, words: Sequence[str]) -> DictConfig:
    """Return the config of a job: the command's config with the job's overrides."""
    composed = context.config_loader.load_sweep_config(config, list(words))
    with open_dict(composed):
        del composed["hydra"]
    return composed


def checked(composed: Sequence[DictConfig], typed: Sequence[Sequence[str]]) -> list[Config]:
    """Return the typed configs; ConfigError with every mistake of every trial, each once.

    typed: each job's overrides.
    """
    configs: list[Config] = []
    problems: dict[str, None] = {}
    for each, words in zip(composed, typed, strict=True):
        try:
            config = to_config(each, words)
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
        problems.append("run.name: a sweep names its trials by their swept values; set sweep.name instead")
    settings: dict[str, list[Any]] = {key: [getattr(config, key) for config in configs] for key in _OF_THE_SWEEP}
    settings |= {"run.storage": [config.run.storage for config in configs]}
    settings |= {"scaling.address": [config.scaling.address for config in configs]}
    for key, values in settings.items():
        if any(value != values[0] for value in values):
            problems.append(f"{key} must be the same in all trials of a sweep: give one value")
    return problems


def _returned(value: float | None) -> JobReturn:
    job = JobReturn()
    job.return_value, job.status = value, JobStatus.COMPLETED
    return job
