"""Quoting of overrides, so that Hydra and YAML read text values as they were typed.

Hydra and YAML read 1.10 as a number, and a path with a bracket as a list or a mistake. If the schema says that a key's
value is text, the text is kept as typed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import types
import typing
from collections.abc import Iterator
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException

_WORD = re.compile(r"(?P<key>\+{0,2}[^=~\s]+)=(?P<value>.*)", re.DOTALL)


def as_typed(schema: type[Any], word: str) -> str:
    """Return a word of Hydra's command line, with its value quoted if it is text that Hydra would read otherwise.

    Interpolations, null, quoted text and sweeps of such values are unchanged.
    """
    parts = _typed(schema, word)
    if parts is None:
        return word
    key, value = parts
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        return f"{key}={_quoted(value)}"
    if not _is_text_key(schema, key):
        return word
    if override.is_sweep_override():
        return f"{key}={','.join(_elements(override, value))}"
    return word if _is_text(override.value()) else f"{key}={_quoted(value)}"


def as_typed_yaml(schema: type[Any], word: str) -> str:
    """Like `as_typed`, for a command that reads its overrides as YAML."""
    parts = _typed(schema, word)
    if parts is None or not _is_text_key(schema, parts[0]):
        return word
    key, value = parts
    is_meant = value == "null" or value[0] == value[-1] in ("'", '"')
    return word if is_meant else f"{key}={json.dumps(value, ensure_ascii=False)}"


def quoted_word(word: str) -> str | None:
    """Return a word quoted for a shell and for Hydra; None if it is no override."""
    parts = _WORD.fullmatch(word)
    if parts is None:
        return None
    quoted = f"{parts['key']}={_quoted(parts['value'])}"
    return shlex.quote(quoted) if re.search(r'["$`!\\]', quoted) else f'"{quoted}"'


def _typed(schema: type[Any], word: str) -> tuple[str, str] | None:
    """Return key and value of an override of a text field; None for others and for interpolations."""
    parts = _WORD.fullmatch(word)
    if parts is None or not parts["value"] or "${" in parts["value"]:
        return None
    key = parts["key"]
    may_be = _is_text_key(schema, key) or _hint(schema, key) is Any
    return (key, parts["value"]) if may_be else None


def _is_text_key(schema: Any, key: str) -> bool:
    hint = _hint(schema, key)
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return str in (typing.get_args(hint) if is_union else (hint,))


def _hint(schema: Any, key: str) -> Any:
    """Return the type of a schema's key, or of a key in one of its mappings; None if it is neither."""
    hints, key = _keys(schema), key.lstrip("+")
    if key in hints:
        return hints[key]
    of = hints.get(key.rpartition(".")[0])
    return typing.get_args(of)[1] if typing.get_origin(of) is dict else None


@functools.cache
def _keys(schema: Any) -> dict[str, Any]:
    return dict(_hints(schema, ""))


def _hints(schema: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, (str, QuotedString))


def _elements(override: Override, value: str) -> list[str]:
    """Return the values of a sweep as typed, quoted if Hydra would read them otherwise."""
    simple = override.value_type == ValueType.SIMPLE_CHOICE_SWEEP and not re.search(r"[\[\]{}()'\"\\]", value)
    if not simple:
        return [value]
    read = override._value.list  # type: ignore[union-attr]
    return [
        text if _is_text(element) else _quoted(text.strip())
        for text, element in zip(value.split(","), read, strict=True)
    ]


def _quoted(value: str) -> str:
    return QuotedString(text=value, quote=Quote.single).with_quotes()
