"""Validation of lines of events.jsonl against the schema of events."""

import dataclasses
import types
import typing

from ftexp.wire.events import EVENTS

HEAD = {"time": float, "event": str, "attempt": int, "step": int}


def problems(line):
    """Return how a line of events.jsonl violates the schema of events."""
    if line.get("event") not in EVENTS:
        return [f"{line.get('event')} is no event"]
    kind = EVENTS[line["event"]]
    hints = {**HEAD, **typing.get_type_hints(kind)}
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING} | HEAD.keys()
    found = [f"{name} is missing" for name in required - line.keys()]
    found += [f"{name} is unknown" for name in line.keys() - hints.keys()]
    return found + [
        f"{name}={value!r} is no {hints[name]}" for name, value in line.items() if not fits(value, hints.get(name))
    ]


def fits(value, hint):
    if hint is None or hint is typing.Any:
        return True
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is types.UnionType:
        return any(fits(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)
