"""From the command line to a checked `Config`; all mistakes are reported in one message, with exit code 2.

Hydra composes; this module only rewords its errors and converts the result to typed objects. Every entry point uses
it. Imports neither torch nor Ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftexp.cli.exit_codes import interrupted_code, print_error
from ftexp.cli.explain import explain, hydras_flags, open_interval, unknown_flag, unknown_key, unknown_option
from ftexp.cli.overrides import as_typed
from ftexp.cli.parse import typed_node
from ftexp.cli.wrapping import print_wrapped
from ftexp.config.checks.recipe import fitted
from ftexp.config.fields import keys_problem
from ftexp.config.schema import Config, config_dir
from ftexp.errors import ConfigError, FtexpError


class _Shared(ConfigNode):
    """A schema that isn't copied with the store: for --help, Hydra copies the whole store a hundred times.

    Hydra copies what it loads from the store again, so the schema is never changed.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


ConfigStore.instance().repo["schema.yaml"] = _Shared(
    name="schema.yaml", node=OmegaConf.structured(Config), group=None, package=None, provider="ftexp"
)


def offer_option(group: str, name: str, node: Any) -> None:
    """Register a dataclass as `group=name`, as if it were a file of that group."""
    ConfigStore.instance().store(name, dataclasses.asdict(node), group=group, provider="ftexp")


_crashes: list[Exception] = []
_noted: set[str] = set()  # notes that were printed: each once, not for every trial of a sweep


@contextlib.contextmanager
def past_composing() -> Iterator[None]:
    """Treat an error in this block as a bug or a failure of the machine, not as a mistake in the command.

    `run_hydra` then lets the traceback through.
    """
    try:
        yield
    except FtexpError:
        raise
    except Exception as error:
        _crashes.append(error)
        raise


def run_hydra(task: Callable[[DictConfig], float | None], argv: Sequence[str]) -> int:
    """Compose from `argv` and call `task` once, or once for each job of a multirun; return the exit code.

    A job that fails with an FtexpError is reported, and the jobs after it still run.
    """
    failures: list[int] = []

    def reporting(composed: DictConfig) -> float | None:
        if (hydra_config := HydraConfig.get()).mode == RunMode.MULTIRUN:
            remove_note(hydra_config.sweep.dir)
        try:
            with past_composing():
                return task(composed)
        except FtexpError as error:
            print_error(error)
            failures.append(error.exit_code)
            return None

    if (problem := unknown_flag(argv)) is not None:
        print_error(ConfigError(problem))
        return ConfigError.exit_code
    sys.argv[1:] = hydras_words(argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, and we word the error
    try:
        with _wrapping() if hydras_flags(argv)[0].help else contextlib.nullcontext():
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(reporting)()
    except KeyboardInterrupt as interrupt:
        return interrupted_code(interrupt)
    except FtexpError as error:  # raised by a launcher, for all jobs
        print_error(error)
        return error.exit_code
    except Exception as error:  # composing raises ValueError, AssertionError and AttributeError too
        if any(error is crash for crash in _crashes):
            raise
        print_error(reworded(error, argv))
        return ConfigError.exit_code
    return max(failures, default=0)


@contextlib.contextmanager
def _wrapping() -> Iterator[None]:
    """Print this block's output at its end, wrapped to the width of a terminal."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        print_wrapped(printed.getvalue().splitlines(), sys.stdout)


def remove_note(sweep_dir: str) -> None:
    """Remove the file of Hydra's sweeper that has the whole config with its secrets; nothing reads it."""
    Path(sweep_dir, "multirun.yaml").unlink(missing_ok=True)


def hydras_words(argv: Sequence[str]) -> list[str]:
    """Return overrides in the form that Hydra accepts."""
    # any key may be added under these, so Hydra's "++" is added for the user
    open_key = re.compile(rf"({'|'.join(map(re.escape, open_keys(Config)))})(\.[^=]+)?=")
    words = [f"++{word}" if open_key.match(word) else _in_full(word) for word in argv]
    return [as_typed(Config, word) for word in words]


def reworded(error: Exception, argv: Sequence[str]) -> ConfigError:
    """Return an error that Hydra raised while it composed `argv`, in this project's words."""
    is_type_only = isinstance(error, TypeError) or "group override must be a string" in str(error)
    unknown = unknown_option(argv) if is_type_only else None
    if "does not support sweep type" in str(error):
        unknown = open_interval(argv)
    return ConfigError(unknown or explain(error))


def open_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the fields of `schema` that hold a mapping with any keys."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from open_keys(hint, f"{key}.")
        elif typing.get_origin(hint) is dict:
            yield key


def _in_full(word: str) -> str:
    """Return `profile.enabled=true` for `profile=true`, since profile has further keys."""
    key, _, value = word.partition("=")
    return f"profile.enabled={value}" if key == "profile" and value.lower() in ("true", "false") else word


def to_config(composed: DictConfig, typed: Sequence[str] | None = None) -> Config:
    """Convert Hydra's composed config to typed objects; ConfigError names each key that does not fit the schema.

    typed: the overrides of this invocation. If given, recipe values that don't fit the others are adjusted, which is
    printed to standard error: see `fitted`. None (a stored config): nothing is changed.
    """
    try:
        if unknown := list(_unknown_keys(composed, Config, "")):
            raise ConfigError("\n".join(unknown))
        # a mandatory value may still be missing: `checks.validate` lists those with the other mistakes
        config: Config = typed_node(composed, Config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if typed is not None:
        config, notes = fitted(config, typed)
        for note in notes:
            if note not in _noted:
                print(f"ftexp: {note}", file=sys.stderr)
        _noted.update(notes)
    return config


def _unknown_keys(node: DictConfig, schema: type[Any], prefix: str) -> Iterator[str]:
    """Yield errors for unknown keys that a leading "+" hid from Hydra's own check."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in node:
        name = str(key)
        if name not in fields:
            yield unknown_key(f"{prefix}{name}")
            continue
        factory = fields[name].default_factory
        default = factory() if callable(factory) else None
        if dataclasses.is_dataclass(default) and not OmegaConf.is_missing(node, name):
            if isinstance(node[name], DictConfig):
                yield from _unknown_keys(node[name], type(default), f"{prefix}{name}.")
            else:  # an interpolation
                yield keys_problem(f"{prefix}{name}", node[name])
