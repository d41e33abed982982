"""The Hydra sweeper behind `hydra/sweeper=tune`: checks the command, then passes it to the search.

hydra-optuna-sweeper (1.3.0) can't be used: it needs optuna < 3, and Optuna is at 5. It would also propose in batches,
each of which waits for its slowest trial, and stop no trial early.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ftexp.cli.compose import past_composing, to_config
from ftexp.config.checks.validate import validate
from ftexp.config.fields import field_problems
from ftexp.config.schema import Config, SearchConfig
from ftexp.errors import ConfigError
from ftexp.sweep.hydra.launcher import PLUGINS, checked, compose
from ftexp.sweep.run.identity import parse_words
from ftexp.sweep.search.space import Dimension, Options, plain_key, probes, read_space

_KEY = "hydra.sweeper"
_OPTUNA = 5  # oldest supported major version


class TuneSweeper(Sweeper):
    """Sweeper that runs a search over the keys for which the command gives several values."""

    __module__ = PLUGINS

    def __init__(self, **settings: Any) -> None:
        self._settings = SearchConfig(**settings)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the arguments of `compose`; a job's task is always ftexp's training, in another process."""
        del task_function
        self._context, self._config = hydra_context, config

    def sweep(self, arguments: list[str]) -> None:
        """Run the search to its end.

        Raises:
            ConfigError: the command is wrong, or differs from the sweep's earlier config; nothing was started.
            SweepFailedError: some trials failed; the others are done.
        """
        parser = OverridesParser.create(config_loader=self._context.config_loader)
        fixed, space = read_space(parser.parse_overrides(arguments))
        points = probes(space)
        words = [_words(fixed, space, point) for point in points]
        composed = [compose(self._context, self._config, each) for each in words]
        configs = checked(composed, words)
        problems = [*self._problems(configs[0]), *_same_values(space, points, fixed, composed)]
        problems += [
            line for config in configs for line in _unlike(config, configs[0], self._settings.scheduler == "asha")
        ]
        if problems:
            raise ConfigError("\n".join(dict.fromkeys(problems)))
        from ftexp.sweep.search.search import SearchSetup, run_search  # late, since it imports Optuna

        with past_composing():
            run_search(SearchSetup(self._settings, space, fixed, configs, self._compose))

    def _compose(self, words: list[str]) -> tuple[Config, dict[str, str]]:
        composed = compose(self._context, self._config, words)
        config = to_config(composed, words)
        validate(config)
        return config, parse_words(words, composed)

    def _problems(self, config: Config) -> list[str]:
        """Return the errors of the search, apart from its space."""
        settings = self._settings
        if wrong := dict(field_problems(settings, f"{_KEY}.")):
            return list(wrong.values())
        problems = []
        metric = config.sweep.metric or config.checkpoint.checkpoint_score_attribute
        if settings.scheduler == "asha":
            if metric.startswith("test_"):
                problems.append(
                    f"{_KEY}.scheduler=asha compares values of each epoch, but {metric} is measured only once, at "
                    "the end of the run: set "
                    "sweep.metric=val_accuracy or another, or hydra.sweeper.scheduler=none"
                )
            if settings.grace_epochs >= config.train.epochs:
                problems.append(
                    f"{_KEY}.grace_epochs={settings.grace_epochs} must be below train.epochs={config.train.epochs}: "
                    "otherwise no trial is stopped early"
                )
        else:
            for name, default in (("grace_epochs", 1), ("reduction_factor", 3.0)):
                if (value := getattr(settings, name)) != default:
                    problems.append(f"{_KEY}.{name}={value} needs {_KEY}.scheduler=asha: set that, or remove it")
        if (lacking := _lacking_optuna()) is not None:
            problems.append(lacking)
        return problems


def _words(fixed: Sequence[str], space: Sequence[Dimension], point: dict[str, str]) -> list[str]:
    return [*fixed, *(f"{each.key}={point[plain_key(each)]}" for each in space)]


def _same_values(
    space: Sequence[Dimension], points: Sequence[dict[str, str]], fixed: list[str], composed: Sequence[DictConfig]
) -> list[str]:
    """Return errors for options with equal values, such as 1e-3 and 0.001: trials are named by values."""
    jobs = [parse_words(_words(fixed, space, point), config) for point, config in zip(points, composed, strict=True)]
    problems = []
    for each in space:
        key = plain_key(each)
        values = {point[key]: job[key] for point, job in zip(points, jobs, strict=True)}
        if isinstance(each, Options) and len(set(values.values())) < len(each.words):
            problems.append(f"{key}={','.join(each.words)} holds one value more than once: give each value once")
    return problems


def _unlike(config: Config, first: Config, is_halved: bool) -> list[str]:
    """Return errors for keys that must be the same in all trials of a search, in addition to those of every sweep."""
    problems = []
    if is_halved and config.train.epochs != first.train.epochs:
        problems.append(f"train.epochs can't be searched with {_KEY}.scheduler=asha, which compares trials by epoch")
    if config.checkpoint.checkpoint_score_attribute != first.checkpoint.checkpoint_score_attribute:
        problems.append("checkpoint.checkpoint_score_attribute can't be searched: it is the objective")
    return problems


def _lacking_optuna() -> str | None:
    wanted = f"hydra/sweeper=tune needs Optuna {_OPTUNA}"
    try:
        found = importlib.metadata.version("optuna")
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted}: uv run --extra tune ..., or pip install 'ftexp[tune]'"
    if int(found.split(".")[0]) < _OPTUNA:
        return f"{wanted} or newer, and {found} is installed: pip install 'optuna>={_OPTUNA}'"
    return None
