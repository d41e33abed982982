"""From overrides, or Hydra's composed config, to typed objects; all mistakes are reported in one ConfigError."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ftexp.cli.explain import explain
from ftexp.cli.overrides import as_typed_yaml
from ftexp.config.fields import field_problems, type_problems
from ftexp.errors import ConfigError


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
        return typed_node(values, schema)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema())) from error


def read_command(schema: type[Any], words: Sequence[str], **needed: str) -> Any:
    """Like `parse_words`, but also check ranges; `needed` has an example for each field without a default."""
    config = parse_words(schema, words)
    for key, example in needed.items():
        if getattr(config, key) == MISSING:
            raise ConfigError(f"{key} is not set: add {key}={example}")
    if problems := dict(field_problems(config, "")):
        raise ConfigError("\n".join(problems.values()))
    return config


def typed_node(node: DictConfig, schema: type[Any]) -> Any:
    """Return `node` as an instance of `schema`; ConfigError names each value of another type."""
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
        if field.name not in node.keys():  # noqa: SIM118 - a value that is missing, or can't be resolved, isn't "in" it
            continue  # newer than the run that wrote this config: its default
        if OmegaConf.is_missing(node, field.name):
            values[field.name] = "???"
        elif dataclasses.is_dataclass(default):
            values[field.name] = _values(node[field.name], type(default))
        else:
            value = node[field.name]
            values[field.name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return schema(**values)
