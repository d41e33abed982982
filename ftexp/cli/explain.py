"""Messages for errors of Hydra and OmegaConf: key, value, allowed values, closest valid name."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Sequence
from typing import Any

# Hydra's command-line parser has no public name, and a copy of its flags would go out of date. This is the parser that
# hydra.main uses; test_cli.py checks that
from hydra._internal.utils import get_args_parser
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from ftexp.cli.overrides import quoted_word
from ftexp.config.fields import keys_problem, list_problem, null_problem, shown
from ftexp.config.masking import flat
from ftexp.config.schema import Config, SearchConfig, config_dir
from ftexp.registry import did_you_mean

_MAX_SUGGESTED = 3  # keys


def unknown_option(argv: Sequence[str]) -> str | None:
    """Return the message for a word such as optim=null or optim=3, for which Hydra reports only the type."""
    for word in argv:
        group, _, option = word.lstrip("+").partition("=")
        directory = config_dir() / group
        if group and directory.is_dir() and not option.startswith("{"):
            options = _options(group)
            if options and not set(option.split(",")) <= set(options):
                return _unknown_option_text(group, option, options)
    return None


def _options(group: str) -> list[str]:
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))


def open_interval(argv: Sequence[str]) -> str:
    """Return the message for a grid with an interval in it, for which Hydra reports only the type."""
    (typed, *_) = [word for word in argv if "interval(" in word]
    return f"{typed}: a grid needs a list of values: list them, or add hydra/sweeper=tune to search the interval"


def hydras_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's own flags, as Hydra parses them, and the words that it doesn't know."""
    return get_args_parser().parse_known_args(list(argv))


def unknown_flag(argv: Sequence[str]) -> str | None:
    """Return the message for the first word such as --batch-size that is no flag of Hydra; None if there is none."""
    flags = [word for word in hydras_flags(argv)[1] if word.startswith("-")]
    if not flags:
        return None
    flag = flags[0].partition("=")[0]
    near = _named_alike(flag.lstrip("-").replace("-", "_"))
    return f"{flag} is not an option: write settings as key=value.{near} Options: --help, --cfg job, --hydra-help"


def _unknown_option_text(group: str, option: str, options: list[str]) -> str:
    return f"{group}={option} is unknown.{did_you_mean(option, options)} Available: {', '.join(options)}"


def explain(error: BaseException, schema: Any = None) -> str:
    """Return the message for an error of Hydra or OmegaConf: key, value, allowed values, closest valid name.

    schema: an instance of the dataclass that was composed; None: `Config`.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [str(name) for name in error.options or ()] or _options(group)  # for a list, Hydra lists none
        if not group:
            return f"--config-name {option}: no such file in {config_dir()}; remove it to use config.yaml"
        return _unknown_option_text(group, option, options)
    if isinstance(error, OverrideParseException):
        word = error.override or ""
        advice = f"if it is text, quote it: {quoted_word(word)}" if "=" in word else "write key=value"
        return f"can't read {word!r}: {advice}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None or not cause.full_key:
        return str(error).replace("\n", " ")
    key, first_line = str(cause.full_key), str(cause).splitlines()[0]
    if first_line.startswith("Key '"):
        return unknown_key(key, schema)
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
    # while OmegaConf creates a node, before inserting it, it knows neither the whole key nor the value
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


def unknown_key(key: str, schema: Any = None) -> str:
    """Return the message for a key that the schema doesn't have, with the closest existing key."""
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
    near = _named_alike(name) or did_you_mean(name, siblings).replace("'", f"'{prefix}", 1)
    return f"{key} is not a key.{near} Keys {f'of {prefix[:-1]}' if prefix else 'at the top'}: {', '.join(siblings)}"


def _named_alike(name: str) -> str:
    """Return " Did you mean 'x' or 'y'?" for the keys of any group that are called `name`, or end with it.

    Users of other tools type such names: lr, epochs, batch_size. Empty if there are none, or too many to choose from.
    """
    keys = [key for key, _ in flat(dataclasses.asdict(Config()), "")]
    found = [key for key in keys if key.rpartition(".")[2] == name]
    found = found or [key for key in keys if key.endswith(f"_{name}")]
    return f" Did you mean {' or '.join(map(repr, found))}?" if 0 < len(found) <= _MAX_SUGGESTED else ""
