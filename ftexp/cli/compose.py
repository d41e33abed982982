"""From the command line to a checked `Config`, with every mistake told in one message and exit code 2.

Hydra composes; this module only rewords its errors and turns the result into typed objects. Used by every
entry point. Imports neither torch nor Ray.
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
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftexp.cli.overrides import as_typed, as_typed_yaml, quoted_word
from ftexp.config.checks.recipe import fitted
from ftexp.config.field_checks import field_problems, keys_problem, list_problem, null_problem, shown, type_problems
from ftexp.config.schema import Config, SearchConfig, config_dir
from ftexp.errors import ConfigError, FtexpError
from ftexp.registry import did_you_mean

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75  # by SIGTERM, after a last save: EX_TEMPFAIL, the same command goes on


class _Shared(ConfigNode):
    """A schema that isn't copied with the store: for --help, Hydra copies the whole store a hundred times.

    What it loads from the store is copied again, so the schema stays as it is.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


ConfigStore.instance().repo["schema.yaml"] = _Shared(
    name="schema.yaml", node=OmegaConf.structured(Config), group=None, package=None, provider="ftexp"
)


def offer_option(group: str, name: str, node: Any) -> None:
    """Let `group=name` stand for a dataclass, as if it were a file of that group."""
    ConfigStore.instance().store(name, dataclasses.asdict(node), group=group, provider="ftexp")


_crashes: list[Exception] = []
_noted: set[str] = set()  # printed once, not for every trial of a sweep


@contextlib.contextmanager
def past_composing() -> Iterator[None]:
    """What goes wrong in this block is no mistake in the command but a bug, here or in a plug-in, or the machine's.

    `run_hydra` lets its traceback through: that is what helps.
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
        try:
            with past_composing():
                return task(composed)
        except FtexpError as error:
            print_error(error)
            failures.append(error.exit_code)
            return None

    # any key may be added under these, so Hydra's "+" is put there for the user
    open_key = re.compile(rf"({'|'.join(map(re.escape, open_keys(Config)))})(\.[^=]+)?=")
    words = [f"++{word}" if open_key.match(word) else _in_full(word) for word in argv]
    sys.argv[1:] = [as_typed(Config, word) for word in words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, and we word the error
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(reporting)()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except FtexpError as error:  # of a launcher, which speaks for all jobs
        print_error(error)
        return error.exit_code
    except Exception as error:  # composing raises ValueError, AssertionError and AttributeError too
        if any(error is crash for crash in _crashes):
            raise
        is_type_only = isinstance(error, TypeError) or "group override must be a string" in str(error)
        unknown = _unknown_option(argv) if is_type_only else None
        if "does not support sweep type" in str(error):
            unknown = _open_interval(argv)
        print_error(ConfigError(unknown or explain(error)))
        return ConfigError.exit_code
    return max(failures, default=0)


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
    """`profile=true` for `profile.enabled=true`: under profile there are further keys."""
    key, _, value = word.partition("=")
    return f"profile.enabled={value}" if key == "profile" and value.lower() in ("true", "false") else word


def interrupted_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code after Ctrl-C or SIGTERM. By name: `fitting` is only imported where something ran."""
    return EXIT_TERMINATED if type(interrupt).__name__ == "Terminated" else EXIT_INTERRUPTED


def exit_code_of(run: Callable[[], object]) -> int:
    """Run a training outside of Hydra; its errors are told, and become exit codes."""
    try:
        run()
    except FtexpError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        return interrupted_code(interrupt)
    return 0


def prepare_streams() -> None:
    """Let standard output and error take any text: what their encoding lacks is replaced; closed ones lead nowhere.

    The first thing that a command does: a file opened before would get the number of a closed stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_error(error: FtexpError) -> None:
    """Write an error for the user: no traceback, a line each where there are several."""
    lines = str(error).splitlines()
    title = "the config is wrong" if isinstance(error, ConfigError) else type(error).__name__
    if len(lines) == 1:
        print(f"ftexp: {lines[0]}", file=sys.stderr)
    else:
        print("\n  ".join([f"ftexp: {title}:", *lines]), file=sys.stderr)


def to_config(composed: DictConfig, typed: Sequence[str] | None = None) -> Config:
    """Turn what Hydra composed into typed objects; ConfigError names what does not fit the schema.

    typed: the overrides of this command. With them, recipe values that don't fit the others are fitted, and the user is
    told on standard error: see `fitted`. None (a stored config): nothing is changed.
    """
    unknown = list(_unknown_keys(composed, Config, ""))
    if unknown:
        raise ConfigError("\n".join(unknown))
    # a mandatory value may still be missing: `checks.validate` lists those with the other mistakes
    try:
        config: Config = _typed(composed, Config)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if typed is not None:
        config, notes = fitted(config, typed)
        for note in notes:
            if note not in _noted:
                print(f"ftexp: {note}", file=sys.stderr)
        _noted.update(notes)
    return config


def parse_words(schema: type[Any], words: Sequence[str]) -> Any:
    """Read key=value words into `schema`, a dataclass; ConfigError names what doesn't fit it."""
    words = [as_typed_yaml(schema, word) for word in words]
    for word in words:
        try:
            OmegaConf.from_dotlist([word])
        except yaml.YAMLError as error:
            key, _, value = word.partition("=")
            raise ConfigError(f"can't read {word!r}: put the value in quotes, {key}=\"'{value}'\"") from error
    try:
        values = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(words)))
        assert isinstance(values, DictConfig), "a dataclass holds keys"
        return _typed(values, schema)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema())) from error


def read_command(schema: type[Any], words: Sequence[str], **needed: str) -> Any:
    """As `parse_words`, with every field in its range; `needed` says what those look like that have no default."""
    config = parse_words(schema, words)
    for key, example in needed.items():
        if getattr(config, key) == MISSING:
            raise ConfigError(f"{key} is not set: add {key}={example}")
    if problems := dict(field_problems(config, "")):
        raise ConfigError("\n".join(problems.values()))
    return config


def _typed(node: DictConfig, schema: type[Any]) -> Any:
    """`node` as an instance of `schema`; ConfigError names each value that is of another type."""
    values = _values(node, schema)
    if problems := list(_type_problems(values, "")):
        raise ConfigError("\n".join(problems))
    return values


def _type_problems(node: Any, prefix: str) -> Iterator[str]:
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _type_problems(value, f"{prefix}{field.name}.")
        elif value != MISSING:
            yield from type_problems(f"{prefix}{field.name}", value, hints[field.name])


def _values(node: DictConfig, schema: type[Any]) -> Any:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        default = field.default_factory() if callable(field.default_factory) else None
        if OmegaConf.is_missing(node, field.name):
            values[field.name] = "???"
        elif dataclasses.is_dataclass(default):
            values[field.name] = _values(node[field.name], type(default))
        else:
            value = node[field.name]
            values[field.name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return schema(**values)


def _unknown_keys(node: DictConfig, schema: type[Any], prefix: str) -> Iterator[str]:
    """Keys that a leading "+" slipped past Hydra's own check."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in node:
        name = str(key)
        if name not in fields:
            yield _unknown_key(f"{prefix}{name}")
            continue
        factory = fields[name].default_factory
        default = factory() if callable(factory) else None
        if dataclasses.is_dataclass(default) and not OmegaConf.is_missing(node, name):
            if isinstance(node[name], DictConfig):
                yield from _unknown_keys(node[name], type(default), f"{prefix}{name}.")
            else:  # of an interpolation
                yield keys_problem(f"{prefix}{name}", node[name])


def _unknown_option(argv: Sequence[str]) -> str | None:
    """The message for a word such as optim=null or optim=3, of which Hydra tells the type only."""
    for word in argv:
        group, _, option = word.lstrip("+").partition("=")
        folder = config_dir() / group
        if group and folder.is_dir() and not option.startswith("{"):
            options = _options(group)
            if options and not set(option.split(",")) <= set(options):
                return _unknown_option_text(group, option, options)
    return None


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))


def _open_interval(argv: Sequence[str]) -> str:
    """The message for a grid with an interval in it, of which Hydra names the type only."""
    (typed, *_) = [word for word in argv if "interval(" in word]
    return f"{typed}: a grid needs values that can be counted: list them, or add hydra/sweeper=tune, which searches"


def _unknown_option_text(group: str, option: str, options: list[str]) -> str:
    return f"{group}={option} is unknown.{did_you_mean(option, options)} Available: {', '.join(options)}"


def explain(error: BaseException, schema: Any = None) -> str:
    """Word an error of Hydra's or OmegaConf's: key, value, what is allowed, nearest valid name.

    schema: an instance of the dataclass that was composed; None: `Config`.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [str(name) for name in error.options or ()] or _options(group)  # of a list, Hydra tells none
        if not group:
            return f"--config-name {option}: there is no such file in {config_dir()}; leave it out for config.yaml"
        return _unknown_option_text(group, option, options)
    if isinstance(error, OverrideParseException):
        word = error.override or ""
        told = f"if it is text, quote it: {quoted_word(word)}" if "=" in word else "write key=value"
        return f"can't read {word!r}: {told}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None or not cause.full_key:
        return str(error).replace("\n", " ")
    key, first_line = str(cause.full_key), str(cause).splitlines()[0]
    if first_line.startswith("Key '"):
        return _unknown_key(key, schema)
    if wanted := re.search(r"could not be converted to (\w+)", first_line):
        names = {"Integer": "a whole number", "Float": "a number"}
        return f"{key}={shown(cause.value)} is not {names.get(wanted[1], wanted[1])}"
    if wrong := re.search(r"Value '(.*)' is not a valid bool", first_line):
        return f"{key}={wrong[1]} is not true or false"
    if wrong := re.search(r"Cannot convert '(\w+)' to string: '(.*)'$", first_line):
        return f"{key}={shown(wrong[2])} is not text"
    if wrong := re.search(r"Key (.+) \(\w+\) is incompatible with \(str\)", first_line):
        return f"{key}: a key must be text, and {wrong[1]} is not"
    if "is not Optional" in first_line or "NoneType is not a subclass" in first_line or "value 'None'" in first_line:
        return null_problem(key)
    # of a node that is made before it is put in its place, OmegaConf knows neither the whole key nor the value
    typed = re.search(r"Error merging override \+*([^=]+)=(.*)", str(error))
    if "is not a subclass of" in first_line or "Cannot assign" in first_line:
        return keys_problem(*typed.groups()) if typed and cause.value is None else keys_problem(key, cause.value)
    if "is not a ListConfig" in first_line:
        return list_problem(key, cause.value)
    if typed and ("Cannot merge" in first_line or "is incompatible with type hint" in first_line):
        allowed = f"is a list, so write {key}=[...]" if _holds_list(key) else f"holds keys, so write {key}.<key>=..."
        return f"{typed[1]}={shown(typed[2])} is not allowed: {key} {allowed}"
    return f"{key}: {first_line}"


def _holds_list(key: str) -> bool:
    hint: Any = Config
    for name in key.split("."):
        hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return typing.get_origin(hint) is list


def _unknown_key(key: str, schema: Any = None) -> str:
    """The message for a key that the schema doesn't have, with the nearest that it has."""
    node: Any = schema if schema is not None else Config()
    *parents, name = key.split(".")
    if parents == ["hydra", "sweeper"]:
        names = [field.name for field in dataclasses.fields(SearchConfig)]
        near = did_you_mean(name, names).replace("'", "'hydra.sweeper.", 1)
        return f"{key} is not a key.{near} Keys of hydra/sweeper=tune: {', '.join(names)}"
    for parent in parents:
        node = getattr(node, parent, None)
    siblings = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    prefix = "".join(f"{parent}." for parent in parents)
    if not siblings:
        return f"{key} is not a key" + (f": {prefix[:-1]} holds one value" if hasattr(Config(), parents[0]) else "")
    near = did_you_mean(name, siblings).replace("'", f"'{prefix}", 1)
    return f"{key} is not a key.{near} Keys {f'of {prefix[:-1]}' if prefix else 'at the top'}: {', '.join(siblings)}"
