"""`python -m ftexp.doctor [any train overrides]`: would such a run start here, and what must be fixed first?

Checks versions, GPUs and driver, shared memory, open files, Ray's directory, free space and speed of run.storage,
whether it can write, rename and list, data.root, and the decode rate. Then starts workers as training does; they
compare a matrix product, their versions and clocks, and time an all-reduce. Nothing is trained, and nothing is left
behind.
Exit codes: 0 a run would start, 1 it would fail, 2 the command was wrong.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ftexp.cli.compose import run_hydra, to_config
from ftexp.cli.entry import command_words, exiting_on_error
from ftexp.config.checks.validate import validate
from ftexp.config.schema import Config
from ftexp.errors import ConfigError

if TYPE_CHECKING:
    from ftexp.doctor.finding import Finding
    from ftexp.doctor.model_size import ModelSize


def main() -> None:
    """Run the command; exit with 0, 1 or 2."""
    words = command_words(__doc__)
    with exiting_on_error():
        if any(word in ("-m", "--multirun") for word in words):
            raise ConfigError("-m: doctor checks one config; remove it")

    def task(composed: DictConfig) -> None:
        if not diagnose(to_config(composed, words)):
            sys.exit(1)

    sys.exit(run_hydra(task, words))


def diagnose(config: Config) -> bool:
    """Print the findings for a run of `config`; return whether it would start. ConfigError if the config is wrong."""
    validate(config)
    from rich.console import Console

    from ftexp.doctor.finding import Verdict, print_table

    plain = not sys.stdout.isatty()
    console = Console(highlight=False, width=200 if plain else None)
    with console.status("checking"):
        findings = examine(config)
    print_table(findings, console)
    return not any(finding.verdict is Verdict.FAILS for finding in findings)


def examine(config: Config) -> list[Finding]:
    """Run all checks, the quick ones first."""
    from ftexp.doctor.decoding import decode_rate
    from ftexp.doctor.disk import data_root, storage_checks
    from ftexp.doctor.finding import Verdict, not_here
    from ftexp.doctor.machine import gpus, open_files, ray_directory, shared_memory, versions

    findings = [versions(), gpus(config), shared_memory(), open_files(), ray_directory(config)]
    size, of_model = _size(config)
    findings.append(of_model)
    findings += storage_checks(config, size.checkpoint_bytes if size is not None else None)
    findings += [data_root(config), decode_rate(config)]
    if any(finding.verdict is Verdict.FAILS for finding in findings):
        return [*findings, not_here("workers", "not started, since a run would fail earlier")]
    return [*findings, *_together(config, size)]


def _size(config: Config) -> tuple[ModelSize | None, Finding]:
    """Return the model's size, None if it can't be built, and a finding about it."""
    from ftexp.cluster.ray_cluster import prepare_environment
    from ftexp.doctor.finding import fails, ok

    with contextlib.suppress(ConfigError):  # a separate check reports a bad Ray directory
        prepare_environment(config)  # before a plug-in imports Ray
    from ftexp.doctor.model_size import model_size

    try:
        size = model_size(config)
    except ConfigError as error:
        return None, fails("model", str(error), "see model.name and model.kwargs")
    in_words = f"{size.num_parameters / 1e6:,.1f} M weights, {size.checkpoint_bytes / 1e6:,.0f} MB a checkpoint"
    return size, ok("model", f"{config.model.name}: {in_words}")


def _together(config: Config, size: ModelSize | None) -> list[Finding]:
    from ftexp.cluster.resources import decide_workers, spare_of
    from ftexp.doctor.disk import probed
    from ftexp.doctor.finding import fails
    from ftexp.doctor.together import together

    try:
        workers = decide_workers(config.scaling, spare=spare_of(config))
    except ConfigError as error:
        return [fails("workers", str(error), "use fewer workers, or fewer resources per worker")]
    with probed(config) as directory:
        return together(config, workers, directory, size)
